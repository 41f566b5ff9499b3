#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes and without network:
#
#   scripts/gpu_check.sh FOLDER          on a machine with a CUDA device
#   scripts/gpu_check.sh FOLDER --dry    the same commands at small sizes, on any machine
#
# WHEELS=DIR installs the wheels in DIR first: what the machine's Python lacks of diffusers, pydantic (with pydantic_core,
# annotated_types and typing_inspection, built for that Python) and, for the tests, pytest, hypothesis and sortedcontainers.
# The package is used from this checkout. FOLDER receives device.txt, tests.txt, kernels.json, step-*.json and table.md;
# a part that fails or runs out of time leaves its log and the rows it had, and the rest goes on.
set -uo pipefail

if [[ $# -lt 1 || $# -gt 2 || (${2:---dry} != --dry) ]]; then
    echo "usage: $0 FOLDER [--dry]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
dry=${2:-}
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}

if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 1
fi
if ! "$python" -c 'import stepdistill.kernels' 2>/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation -e . || exit 1
fi

if ! "$python" -c 'import stepdistill.training.trainer'; then
    echo "put the wheel of the missing library into a folder and name it: WHEELS=FOLDER $0 $1" >&2
    exit 1
fi

failed=0
# part NAME SECONDS COMMAND...: runs it, its output in NAME.txt.
part() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    if ! timeout "$seconds" "$@" >"$out/$name.txt" 2>&1; then
        echo "   failed, see $out/$name.txt" >&2
        failed=1
    fi
}

part device 30 "$python" -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
step=("$python" scripts/bench_step.py)
if [[ -n $dry ]]; then
    part kernels 150 "$python" scripts/bench_kernels.py --tiny --no-compile --rounds 1 --batch-sizes 1 --json "$out/kernels.json"
    for network in sd15 sdxl; do
        part "step-$network" 240 "${step[@]}" --networks "$network" --methods lcm --batch-size 2 --repeats 1 --tiny \
            --precision bf16 --json "$out/step-$network.json"
    done
else
    part tests 120 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels tests/recipe/test_memory_options.py \
        tests/pipeline/test_conditioning.py tests/pipeline/test_encoders.py tests/pipeline/test_resting.py \
        tests/test_stored_weights.py
    part kernels 100 "$python" scripts/bench_kernels.py --json "$out/kernels.json"
    part step-sd15 60 "${step[@]}" --networks sd15 --batch-size 4 --precision bf16 --json "$out/step-sd15.json"
    part step-sdxl 60 "${step[@]}" --networks sdxl --batch-size 2 --methods dmd2 --repeats 3 --precision bf16 \
        --json "$out/step-sdxl.json"
    part step-sd15-compiled 180 "${step[@]}" --networks sd15 --batch-size 4 --methods lcm --precision bf16 --compile \
        --json "$out/step-sd15-compiled.json"
fi
part table 15 "$python" scripts/hardware_table.py "$out"
cp "$out/table.txt" "$out/table.md"
exit "$failed"
