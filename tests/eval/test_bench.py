"""The benchmark on tiny pipelines: rows, cache, what a row depends on, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from synthetic import ROWS, hasty, pictures

from pipeline.tiny import tiny_dit
from stepdistill import bench as run_bench
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler, draw
from stepdistill.eval.bench.rows import open_bench
from stepdistill.eval.bench.run import solver_samplers
from stepdistill.eval.bench.samples import check_classes
from stepdistill.eval.bench.settings import Settings
from stepdistill.eval.bench.sources import read_source
from stepdistill.eval.measure import load_view
from stepdistill.eval.protocol import load_protocol
from stepdistill.eval.references import build_reference
from stepdistill.eval.row_cache import RowCache, empty_measurements, row_key, weights_digest
from stepdistill.files import write_json
from stepdistill.pipeline.trace import trace
from stepdistill.sampling.solvers import stock_solvers

TEACHER_STEPS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, and a run whose export is a 2-step student of it."""
    root = tmp_path_factory.mktemp("pipelines")
    pipeline = tiny_dit()
    pipeline.save_pretrained(root / "teacher")
    run = root / "mine"
    with torch.no_grad():
        next(pipeline.transformer.parameters()).mul_(1.1)
    pipeline.scheduler = LCMScheduler.from_config(
        pipeline.scheduler.config, original_inference_steps=2, clip_sample=False
    )
    pipeline.save_pretrained(run / "export")
    facts = {"teacher": str(root / "teacher"), "guidance": 2.0, "method": "dmd2", "steps": 2, "sampler": "renoise"}
    (run / "export" / "stepdistill.json").write_text(json.dumps(facts))
    (run / "recipe.yaml").write_text("{}\n")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "student/loss/dmd": 0.5}\n{"step": 2, "student/loss/dmd": 0.4}\n{"st'
    )
    return root


@pytest.fixture
def measured(protocol_file, tmp_path, monkeypatch):
    """``measured(*sources, ...)``: a benchmark under the small protocol, with its own cache and a hasty teacher."""
    hasty(protocol_file, steps=TEACHER_STEPS)
    monkeypatch.setattr("stepdistill.eval.bench.showing.PICTURES_PER_CLASS", 1)
    protocol = load_protocol(protocol_file)
    networks = {"classifier": load_view(protocol.views["classifier"], tmp_path, "cpu")}
    build_reference(*pictures(ROWS, seed=0), protocol.reference.path(), protocol=protocol, networks=networks)
    stated = {"protocol": protocol_file, "networks": ["classifier"], "cache": tmp_path / "cache", "samples": 20}
    return lambda *sources, **options: run_bench([*sources], **(stated | options))


@pytest.fixture(scope="module")
def sampler(folders):
    traced = trace(tiny_dit())
    return Sampler("x", "student", traced, weights_digest(traced.pipeline), tuple(range(10)), steps=2, guidance=1.0)


def sample(sampler, seed, count):
    return draw(sampler, range(count), 0, seed=seed, batch=None)


def test_a_run_gives_students_teacher_solvers_and_a_verdict(folders, measured, tmp_path):
    said = []
    report = measured(folders / "mine", steps=(1, 3), out=tmp_path / "report", progress=lambda *line: said.append(line))
    rows = {(row.name, row.steps): row for row in report.rows}
    assert [(row.role, row.steps, row.nfe, row.guidance) for row in report.rows if row.role != "solver"] == [
        ("teacher", TEACHER_STEPS, 2 * TEACHER_STEPS, 2.0),
        ("student", 1, 1, 1.0),
        ("student", 2, 2, 1.0),
    ]
    assert {row.name for row in report.rows if row.role == "solver"} == {
        "DDIM", "DPM-Solver++", "UniPC", "DDIM w=2", "DPM-Solver++ w=2", "UniPC w=2",
    }  # fmt: skip
    assert {row.nfe for row in report.rows if row.role == "solver"} == {2}
    assert rows[("mine (dmd2)", 2)].samples == 20 and ("teacher w=2", TEACHER_STEPS) in rows
    assert report.remarks == ["mine (dmd2): no row at 3 steps; its LCMScheduler was made for 2 and takes no more."]
    conclusion = report.verdict[0]
    student, teacher = rows[("mine (dmd2)", 2)].metrics, rows[("teacher w=2", TEACHER_STEPS)].metrics
    assert conclusion.ratio == pytest.approx(student["fd_classifier"] / teacher["fd_classifier"])
    for row in report.rows:
        assert row.cost["seconds_per_image"] > 0 and row.cost["peak_memory_mib"] > 1 and row.cost["parameters"] > 1000
        assert tuple(row.metrics) == (
            "fd_classifier", "kid_classifier", "precision", "recall", "accuracy", "diversity_classifier",
        )  # fmt: skip
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    # Four conditions side by side and under the slider; two plots; pictures of teacher, solver and both students, the
    # worst of the students, and the training.
    assert page.count('<figure data-pair="1 0 ') == 4 and 'class="slider"' in page
    assert page.count("<figure>") == 2 + 4 + 2 + 1 and "losses, gradient norms" in page
    assert page.count("least like their classes</figcaption>") == 2 and "NFE 2 · FD-classifier@20" in page
    assert said[:2] == [(f"teacher w=2, {TEACHER_STEPS} steps", done, 20) for done in (0, 20)]


def test_a_teacher_guided_in_an_interval_has_a_row_of_its_own(folders, measured, tmp_path):
    shutil.copytree(folders / "mine", tmp_path / "mine")
    path = tmp_path / "mine" / "export" / "stepdistill.json"
    stated = {"teacher": {"guidance": {"scale": 2.0, "interval": [0.3, 0.6], "rescale": 0.0}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": stated}))
    plain, limited = (
        next(row for row in measured(run, steps=(1,), solvers=False).rows if row.role == "teacher")
        for run in (folders / "mine", tmp_path / "mine")
    )
    assert plain.name == "teacher w=2" and limited.name == "teacher w=2 on times 0.3-0.6"
    assert TEACHER_STEPS < limited.nfe < plain.nfe and limited.metrics != plain.metrics


def test_a_second_benchmark_runs_nothing_and_says_so(folders, measured, tmp_path):
    first = measured(folders / "mine", steps=(1,))
    shutil.rmtree(tmp_path / "cache" / "samples")  # rows are enough
    again = measured(folders / "mine", steps=(1, 2), progress=lambda *line: pytest.fail(f"ran {line}"))
    assert not any(row.cached for row in first.rows) and all(row.cached for row in again.rows)
    assert [row.metrics for row in again.rows] == [row.metrics for row in first.rows]


def test_rows_from_before_a_metric_are_whole_unless_asked_for(folders, measured, tmp_path):
    measured(folders / "teacher", steps=(1,), solvers=False)
    (path,) = (tmp_path / "cache" / "rows").glob("*.json")
    stored = json.loads(path.read_text())
    young = stored["metrics"].pop("diversity_classifier")
    write_json(path, stored)
    report = measured(folders / "teacher", steps=(1,), solvers=False)
    assert report.rows[0].cached and "diversity_classifier" not in report.rows[0].metrics
    assert "Diversity" not in report.to_markdown()
    stated = {"protocol": tmp_path / "test-v1.yaml", "networks": ["classifier"], "cache": tmp_path / "cache"}
    bench = open_bench(Settings(**stated, device="cpu", complete=True), 20, 0)
    path = str(folders / "teacher")
    row = bench.row(bench.sampler(path, name="t", role="teacher", steps=TEACHER_STEPS, guidance=1.0), bench.real)
    assert not row.cached and row.metrics["diversity_classifier"] == pytest.approx(young)
    assert {**stored["metrics"], "diversity_classifier": young} == pytest.approx(row.metrics)


def test_two_students_share_their_teacher(folders, measured):
    report = measured(folders / "mine", folders / "mine" / "export", steps=(2,), solvers=False)
    assert [(row.name, row.role) for row in report.rows] == [("teacher w=2", "teacher"), ("mine (dmd2) [1]", "student")]
    assert [entry.student for entry in report.verdict] == ["mine (dmd2) [1]", "mine (dmd2) [1]"]
    assert report.labels == report.files == {}


def test_a_plain_pipeline_is_measured_as_it_is(folders, measured):
    report = measured(folders / "teacher", steps=(2,), guidance=1.5)
    assert report.rows[0].name == "teacher w=1.5" and report.rows[0].role == "teacher" and report.verdict == []
    assert {row.nfe for row in report.rows[1:]} == {2}


def test_shipped_rows_are_used_under_the_same_protocol_only(folders, measured, protocol_file, tmp_path):
    measured(folders / "teacher", steps=(1,), solvers=False)
    (path,) = (tmp_path / "cache" / "rows").glob("*.json")
    protocol = load_protocol(protocol_file)
    shipped = empty_measurements(protocol.digest)
    shipped["rows"][path.stem] = json.loads(path.read_text()) | {
        "cost": {"seconds_per_image": 7.0, "peak_memory_mib": 1.0}
    }
    shipped["floors"]["20"] = {"fd_classifier": 1.25}
    write_json(tmp_path / "measurements.json", shipped)
    path.unlink()
    assert (
        RowCache(tmp_path, tmp_path / "measurements.json", protocol.digest).get(path.stem)["cost"]["seconds_per_image"]
        == 7
    )
    (row,) = measured(folders / "teacher", steps=(1,), solvers=False).rows
    # Its metrics are the stored ones; its seconds were taken here.
    assert row.cached and row.machine and 0 < row.cost["seconds_per_image"] < 7
    assert RowCache(tmp_path, tmp_path / "measurements.json", "another").get(path.stem) is None
    path.write_text('{"half')
    assert RowCache(tmp_path / "cache", None, protocol.digest).get(path.stem) is None


def test_the_key_of_a_row_names_everything_it_depends_on(sampler):
    stated = {
        "weights": sampler.weights,
        "scheduler": DDIMScheduler(),
        "steps": 4,
        "guidance": 1.0,
        "seed": 0,
        "samples": 9,
    }
    stated["protocol"] = "p"
    key = row_key(**stated)
    assert key == row_key(**(stated | {"scheduler": DDIMScheduler(), "guidance": 1}))
    changes = {
        "weights": "w", "scheduler": DDIMScheduler(beta_end=0.03), "steps": 5, "guidance": 1.5, "seed": 1,
        "samples": 10, "protocol": "q",
    }  # fmt: skip
    keys = {row_key(**(stated | {name: value})) for name, value in changes.items()}
    assert len(keys) == len(changes) and key not in keys


def test_weights_digest_sees_one_changed_number_and_survives_the_disk(folders, tmp_path):
    pipeline = tiny_dit()
    digest = weights_digest(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert weights_digest(type(pipeline).from_pretrained(tmp_path)) == digest
    with torch.no_grad():
        next(pipeline.vae.parameters()).view(-1)[0] += 1e-3
    assert weights_digest(pipeline) != digest


def test_solvers_spend_the_same_passes_and_none_is_guided_below_two(sampler):
    guided = replace(sampler, guidance=2.0)
    assert [s.nfe for s in solver_samplers(guided, nfe=4)] == [4] * 6
    assert [s.steps for s in solver_samplers(guided, nfe=4)] == [4, 2] * 3
    assert [s.guidance for s in solver_samplers(guided, nfe=1)] == [1.0] * 3
    assert [s.guidance for s in solver_samplers(sampler, nfe=4)] == [1.0] * 3


def test_every_solver_starts_at_noise_and_approaches_the_teacher(sampler):
    target = sample(replace(sampler, steps=50), seed=0, count=2)
    for name, scheduler in stock_solvers(sampler.scheduler).items():
        errors = []
        for steps in (2, 20):
            scheduler.set_timesteps(steps)
            assert scheduler.timesteps[0] == 999
            images = sample(replace(sampler, solver=scheduler, steps=steps), seed=0, count=2)
            errors.append((images.float() - target.float()).abs().mean())
        assert errors[1] < 0.3 * errors[0], name


def test_flow_teachers_get_flow_solvers():
    solvers = stock_solvers(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert list(solvers) == ["Euler", "DPM-Solver++", "UniPC"]
    for scheduler in solvers.values():
        scheduler.set_timesteps(4)
        sigmas = scheduler.sigmas
        assert sigmas[0] > 0.99 and sigmas[-1] == 0
    middle = [float(scheduler.sigmas[2]) for scheduler in solvers.values()]
    assert middle[1] == pytest.approx(middle[2], rel=1e-3)
    # Qwen-Image's: pipelines compute the shift from these and the picture's size.
    told = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, **told)
    solvers = stock_solvers(own)
    assert all(told.items() <= dict(solver.config).items() for solver in solvers.values())
    assert solvers["Euler"].config.shift_terminal == 0.02


def test_edm_teachers_get_edm_solvers_and_unknown_ones_none():
    own = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, sigma_data=0.7)
    solvers = stock_solvers(own)
    assert list(solvers) == ["Euler", "DPM-Solver++"]
    for scheduler in solvers.values():
        scheduler.set_timesteps(4)
        assert float(scheduler.sigmas[0]) == pytest.approx(50.0) and scheduler.config.sigma_data == 0.7
    bare = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", sigma_min=1, sigma_max=9)
    assert stock_solvers(bare) == {}


def test_runs_without_an_export_and_damaged_facts_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(InputError, match="no export/ yet"):
        read_source(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model_index.json").write_text("{}")
    (tmp_path / "export" / "stepdistill.json").write_text('{"teacher": "x", "guidance": 1}')
    with pytest.raises(InputError, match="method, steps missing"):
        read_source(tmp_path)
    (tmp_path / "export" / "stepdistill.json").write_text("{")
    with pytest.raises(InputError, match=r"stepdistill\.json:1: expected JSON"):
        read_source(tmp_path)


def test_a_pipeline_with_other_classes_or_images_is_refused(sampler):
    fashion = load_protocol("fashion-v1")
    many = fashion.model_copy(update={"id": "other-v1", "classes": tuple(map(str, range(1001)))})
    with pytest.raises(InputError, match="other-v1 expects 1001 classes, DiTPipeline has 10"):
        check_classes(sampler.trace, many, "tiny")
    with pytest.raises(InputError, match=r"images of shape \(3, 64, 64\), found \(1, 32, 32\)"):
        check_classes(sampler.trace, fashion.model_copy(update={"image": (3, 64, 64)}), "tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": ()}, "steps: expected numbers of at least 1"),
        ({"steps": (0, 4)}, "steps: expected numbers of at least 1"),
        ({"samples": 1}, "samples: expected at least 2, found 1"),
        ({"solver": False}, "unknown option 'solver'; did you mean 'solvers'"),
        ({"batch": 65}, "batch: expected a number from 1 to 64, found 65"),
        ({"networks": ["inception"]}, "networks: protocol test-v1 has classifier, enet, found 'inception'"),
    ],
)
def test_numbers_out_of_range_are_refused(folders, measured, options, message):
    with pytest.raises(InputError, match=message):
        measured(folders / "mine", **options)
    with pytest.raises(InputError, match="at least one run or pipeline"):
        measured()
