"""What trains on which card: peaks that `stepdistill plan` expects of published models, the table of docs/fits.md and,
of LoRA students, README's.

    python scripts/fit_table.py                  # every model, some minutes of one core each; writes docs/fits.json
    python scripts/fit_table.py flux-dev         # that model's rows again
    python scripts/fit_table.py --page           # the tables from docs/fits.json alone

Nothing is downloaded: networks are those of tests/published.py, or the defaults of their class where these are the
published sizes; encoders and autoencoders count by their parameters; the call of each network is stated below.
"""

import argparse
import functools
import json
import runpy
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.experts import Experts, Turn
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.diffusion.window import Window
from stepdistill.errors import InputError
from stepdistill.eval.report import between_markers
from stepdistill.pipeline.trace import Guidance, Trace
from stepdistill.planning import plan
from stepdistill.planning.fake_pipeline import Blueprint, without_data
from stepdistill.recipe import load
from stepdistill.recipe.memory import GIB, RESERVE

ROOT = Path(__file__).parents[1]
PUBLISHED = runpy.run_path(str(ROOT / "tests" / "published.py"))
FACTS, BETAS = PUBLISHED["MODELS"], PUBLISHED["LATENT_BETAS"]
PAGE, NUMBERS = ROOT / "docs" / "fits.md", ROOT / "docs" / "fits.json"
BEGIN, END = "<!-- cards: written by scripts/fit_table.py -->", "<!-- end of cards -->"
CARDS = (16, 24, 32, 48, 80)
# README shows these cards, and the bases that have recipes.
FIRST_CARDS, FIRST_MODELS = (16, 24, 48), ("sd15", "sdxl", "sd35-medium", "flux-dev")
WAN = "WanTransformer3DModel", {}, (16, 21, 60, 104)


@dataclass(frozen=True)
class Model:
    """How a network is called, and what stands beside it.

    Args:
        title: for people, with the size that it is trained at.
        cond: shapes of one row of its conditions.
        encoders: parameters of its encoders.
        autoencoder: parameters.
        network: (class, config, latents' shape); None: those of tests/published.py.
        constants: further arguments.
        names: of the arguments that are sample and timestep.
        embedded: guidance is an input.
        experts: how many networks take turns.
    """

    title: str
    cond: dict[str, tuple[int, ...]]
    encoders: float
    autoencoder: float
    network: tuple[str, dict[str, Any], tuple[int, ...]] | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, str] = ("hidden_states", "timestep")
    embedded: bool = False
    spec: dict[str, Any] = field(default_factory=dict)
    experts: int = 1


def positions(*shape: int) -> torch.Tensor:
    """Place of each token; all the same, as only its shape counts."""
    return torch.zeros(*shape)


CLIP_L, CLIP_G, T5_XXL, UMT5_XXL = 0.123e9, 0.695e9, 4.762e9, 5.681e9
MISTRAL_SMALL, QWEN_VL_7B, QWEN3_4B = 24.01e9, 8.292e9, 4.022e9
SDXL_COND = {
    "encoder_hidden_states": (77, 2048),
    "added_cond_kwargs.text_embeds": (1280,),
    "added_cond_kwargs.time_ids": (6,),
}
SD3_COND = {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}
WAN_COND = {"encoder_hidden_states": (512, 4096)}
MODELS = {
    "sd15": Model(
        "SD 1.5, 512 px", {"encoder_hidden_states": (77, 768)}, CLIP_L, 0.084e9, names=("sample", "timestep")
    ),
    "sdxl": Model("SDXL, 1024 px", SDXL_COND, CLIP_L + CLIP_G, 0.084e9, names=("sample", "timestep")),
    "sd35-medium": Model("SD 3.5 medium, 1024 px", SD3_COND, CLIP_L + CLIP_G + T5_XXL, 0.084e9),
    "sd35-large": Model("SD 3.5 large, 1024 px", SD3_COND, CLIP_L + CLIP_G + T5_XXL, 0.084e9),
    "flux-dev": Model(
        "FLUX.1-dev, 1024 px",
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,), "guidance": ()},
        CLIP_L + T5_XXL,
        0.084e9,
        constants={"txt_ids": positions(512, 3), "img_ids": positions(4096, 3)},
        embedded=True,
    ),
    "flux2-dev": Model(
        "FLUX.2-dev, 1024 px",
        {"encoder_hidden_states": (512, 15360), "guidance": ()},
        MISTRAL_SMALL,
        0.084e9,
        ("Flux2Transformer2DModel", {}, (4096, 128)),
        {"txt_ids": positions(512, 4), "img_ids": positions(4096, 4)},
        embedded=True,
    ),
    "qwen-image": Model(
        "Qwen-Image, 1024 px",
        {"encoder_hidden_states": (512, 3584)},
        QWEN_VL_7B,
        0.127e9,
        constants={"img_shapes": [[(1, 64, 64)]]},
    ),
    "z-image": Model(
        "Z-Image, 1024 px",
        {"cap_feats": (512, 2560)},
        QWEN3_4B,
        0.084e9,
        names=("x", "t"),
        spec={"lists": frozenset({"x", "cap_feats"}), "window": Window(frame_axis=2), "output": "negated"},
    ),
    "wan21-1.3b": Model("Wan 2.1 1.3B, 81 frames of 480 x 832", WAN_COND, UMT5_XXL, 0.127e9),
    "wan21-14b": Model("Wan 2.1 14B, 81 frames of 480 x 832", WAN_COND, UMT5_XXL, 0.127e9, WAN),
    "wan22-a14b": Model("Wan 2.2 A14B, 81 frames of 480 x 832", WAN_COND, UMT5_XXL, 0.127e9, WAN, experts=2),
}
BASE = {
    "teacher.precision": "bf16",
    "train.precision": "bf16",
    "train.gradient_checkpointing": True,
    "train.batch_size": 16,
    "train.accumulation": 16,
    "student.steps": 4,
    "student.rank": 64,
    "train.steps": 1000,
    "train.lr": 1e-5,
}
WHOLE, HOPELESS = "all weights, DMD2", 4_700_000_000
METHODS: dict[str, dict[str, Any]] = {
    "LoRA, DMD2": {"method": {"name": "dmd2", "critic_steps": 5}, "student.train": "lora"},
    "LoRA, LCM": {"method": {"name": "lcm", "target_ema": 0.0}, "student.train": "lora"},
    WHOLE: {"method": {"name": "dmd2", "critic_steps": 5}, "student.train": "full"},
}
# In order of what they cost: nothing much, time, rounding.
EIGHT = {"train.optimizer": "adamw8bit"}
WAYS = {
    "": {},
    "8-bit Adam": EIGHT,
    "fp8": EIGHT | {"teacher.storage": "fp8"},
    "nf4": EIGHT | {"teacher.quantize": "nf4"},
    "offload": EIGHT | {"teacher.offload": "group"},
    "offload, fp8": EIGHT | {"teacher.offload": "group", "teacher.storage": "fp8"},
}


def drawn(name: str) -> Blueprint:
    """The pipeline of a model, as far as its memory goes."""
    model, mode = MODELS[name], FakeTensorMode(allow_non_fake_inputs=True)
    facts = FACTS.get(name)
    kind, config, shape = model.network or (facts.network, facts.network_config, facts.latent_shape)
    noisy = kind == "UNet2DConditionModel"
    scheduler = DDIMScheduler(**BETAS, clip_sample=False) if noisy else FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule, prediction = from_scheduler(scheduler)
    component = "unet" if noisy else "transformer"
    names = [component, *(f"{component}_{number}" for number in range(2, model.experts + 1))]
    with without_data(mode):
        make = getattr(diffusers, kind).from_config
        networks = {one: make(config).to(torch.bfloat16).eval() for one in names}
        beside = [nn.Linear(1, int(count), bias=False).bfloat16() for count in (model.encoders, model.autoencoder)]
        rows = {key: torch.zeros(1, *shape, dtype=torch.bfloat16) for key, shape in model.cond.items()}
    components = {**networks, "text_encoder": beside[0], "vae": beside[1]}
    pipeline = SimpleNamespace(**components, components=components, scheduler=scheduler, _lora_loadable_modules=names)
    spec, network = CallSpec(*model.names, constants=model.constants, **model.spec), networks[component]
    if model.experts > 1:
        spec, network = replace(spec, experts={component: Turn(0.0)}), Experts(networks)
    traced = Trace(
        pipeline=pipeline,
        component=component,
        entry="prompt",
        denoiser=Denoiser(network, spec, schedule, prediction),
        guidance=Guidance("embedded" if model.embedded else "none"),
        latent_shape=tuple(shape),
        conditioning={key: tuple(row.shape[1:]) for key, row in rows.items()},
        self_test_error=0.0,
        encoders=("text_encoder",),
    )
    return Blueprint(traced, rows, mode)


def peaks(name: str, method: str, folder: Path) -> dict[str, Any]:
    """GiB at the peak by way, and the model's parameters; the turns of the players are gone through once."""
    keys = BASE | METHODS[method] | {"teacher.pipeline": "owner/model", "teacher.guidance.scale": 4.0}
    keys |= {"data.conditions": ["one", "two"]}
    if keys["method"]["name"] == "lcm":
        keys |= {"data.images": str(folder), "data.conditions": "captions"}
    pipeline, known = drawn(name), []
    method_of = functools.cache(functools.partial(plan.method_of, recipe_of(keys), pipeline))
    size = sum(weight.numel() for weight in pipeline.trace.denoiser.network.parameters())
    turns = plan._turns if method != WHOLE or size < HOPELESS else weights_alone
    # Ways differ in bytes of weights and moments alone.
    plan.blueprint_of = lambda _: pipeline
    own, plan.method_of = (plan._turns, plan.method_of), lambda *_: method_of()
    plan.set_up = lambda _traced, _scheduler, steps: {"num_inference_steps": steps}
    plan._turns = lambda *given: known or known.extend(turns(*given)) or known
    found: dict[str, Any] = {}
    try:
        for way, changes in WAYS.items():
            try:
                one = plan.plan(recipe_of(keys | changes))
            except InputError as error:
                found[way] = None
                print(f"{name} {method} {way}: {error}", flush=True)
                continue
            found[way] = {"peak": one.peak / GIB, "player": one.player, "host": one.host_phases}
            found[way] |= {"parameters": next(line.parameters for line in one.lines if line.name == "teacher")}
            print(f"{name:12} {method:28} {way:12} {one.peak / GIB:7.1f} GiB, {one.player}", flush=True)
    finally:
        plan._turns, plan.method_of = own
    return found


def weights_alone(recipe: Any, drawn: Blueprint, method: Any, known: Any) -> list[tuple[str, int]]:
    """In the place of the players' turns where their weights and moments are more than any card holds."""
    players = {player: method.checked_modules(player) for player in method.players}
    return [(player, 4 * sum(p.numel() for one in own for p in one.parameters())) for player, own in players.items()]


def recipe_of(settings: dict[str, Any]) -> Any:
    """A recipe of dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return load(tree)


def fitting(ways: dict[str, Any], card: int) -> str | None:
    """The first way that fits a card; None: no way does."""
    return next((way for way, one in ways.items() if one and one["peak"] + RESERVE <= card), None)


def cells(ways: dict[str, Any]) -> list[str]:
    """Of each card the first way that fits it, and the peaks of all ways."""
    found = [{None: "-", "": "yes"}.get(way, way) for way in (fitting(ways, card) for card in CARDS)]
    return found + [f"{one['peak']:.1f}" if one else "" for one in ways.values()]


def first_table(numbers: dict[str, Any]) -> str:
    """README's: peaks of the LoRA students by DMD2 on three cards. No run has been timed yet."""
    lines = [["base", *(f"{card} GB card" for card in FIRST_CARDS), "hours"], ["---"] * (2 + len(FIRST_CARDS))]
    for name in FIRST_MODELS:
        if ways := numbers.get(name, {}).get("LoRA, DMD2"):
            found = [fitting(ways, card) for card in FIRST_CARDS]
            peaks = ["does not fit" if way is None else f"{ways[way]['peak']:.1f} GiB" for way in found]
            texts = [f"{peak}, {way}" if way else peak for way, peak in zip(found, peaks, strict=True)]
            lines.append([MODELS[name].title, *texts, "not measured"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(numbers: dict[str, Any]) -> str:
    """The page in Markdown."""
    head = ["model", "method", *(f"{card} GB" for card in CARDS), *(way or "plain" for way in WAYS)]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for name, methods in numbers.items():
        for method, ways in methods.items():
            size = next(one["parameters"] for one in ways.values() if one)
            title = f"{MODELS[name].title} ({size / 1e9:.2g} B)"
            lines.append(" | ".join([title, method, *cells(ways)]))
    left = {model.title: METHODS.keys() - numbers.get(name, {}).keys() for name, model in MODELS.items()}
    words = [
        title if len(methods) == len(METHODS) else f"{title} ({'; '.join(sorted(methods))})"
        for title, methods in left.items()
        if methods
    ]
    rest = f"\nNot counted yet: {'. '.join(words)}.\n" if words else ""
    return HEAD + "\n".join(f"| {line} |" for line in lines) + "\n" + rest


HEAD = """# GPU memory: what trains on which card

Expected by `stepdistill plan`'s counting of one step on fake tensors, made by `python scripts/fit_table.py` from
published configs; nothing here was measured on a GPU. A run of your own is planned with
`stepdistill plan RECIPE --gpu 24` ([how](plan.md)), whose prompts, images and settings count as well.

Every row: `teacher.precision: bf16`, `train.precision: bf16`, `train.gradient_checkpointing: true`, micro-batches of
one sample, 4 steps, adapters of rank 64. "LoRA, DMD2" is one frozen backbone with an adapter each for student and
critic. A card's column names the first way that fits it with 1 GiB left to the driver. **yes**: no more than the
above is needed. **8-bit Adam**: `train.optimizer: adamw8bit`, which is on in the following ways too. **fp8**:
`teacher.storage: fp8`. **nf4**: `teacher.quantize: nf4`. **offload**: `teacher.offload: group`, the same numbers,
slower. **offload, fp8**: both. "-": none of them. With offload the autoencoder rests as well. The columns behind are
the peaks in GiB of each; empty: the recipe is refused. The peak may be that of encoding, where encoders, backbone and
autoencoder are on the device together: offloading the backbone helps there too. Of networks above 4.7 B parameters
that are trained whole only weights, gradients and moments are counted: these are more than any of the cards holds.
Wan 2.2's A14B counts with both of its experts.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (none: all)")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    if strangers := set(options.models) - set(MODELS):
        parser.error(f"models: expected some of {', '.join(MODELS)}, found {sorted(strangers)[0]}")
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.is_file() else {}
    with tempfile.TemporaryDirectory() as place:
        Image.new("RGB", (64, 64)).save(Path(place) / "one.png")
        (Path(place) / "one.txt").write_text("one")
        for name in () if options.page else options.models or MODELS:
            numbers[name] = {method: peaks(name, method, Path(place)) for method in METHODS}
            rows = (f"{json.dumps(model)}: {json.dumps(found)}" for model, found in numbers.items())
            NUMBERS.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    numbers = {name: numbers[name] for name in MODELS if name in numbers}
    PAGE.write_text(page(numbers), encoding="utf-8")
    between_markers(ROOT / "README.md", BEGIN, END, first_table(numbers))


if __name__ == "__main__":
    main()
