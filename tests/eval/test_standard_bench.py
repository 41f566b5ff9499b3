"""Benchmarks of tiny pipelines under protocols of prompts, with a cheap network in Inception's place."""

import copy
import json
import os
import shutil
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from diffusers import LCMScheduler
from PIL import Image

from pipeline.tiny import tiny_dit, tiny_flux, tiny_sd
from stepdistill import bench as run_bench
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler, draw
from stepdistill.eval.metrics import Moments, frechet_distance
from stepdistill.eval.perceptual import ALSO, Lpips
from stepdistill.eval.protocol import FileSpec
from stepdistill.eval.report import merge, read_report
from stepdistill.eval.shards import SHARD, Shards
from stepdistill.pipeline.trace import trace

SAMPLES = SHARD + 16


class Shrunk(torch.nn.Module):
    """Rows are images shrunk to 3 x 2 x 2, in float64 so that batches of any size give the same."""

    features = 12

    def prepare(self, image):
        return torch.nn.functional.adaptive_avg_pool2d(image.expand(3, -1, -1).double(), 2)

    def rows(self, batch):
        rows = batch.flatten(1).float()
        return {"rows": rows, "logits": rows[:, :5] / 100}

    def texts(self, prompts):
        return torch.stack([torch.full((12,), float(len(prompt))) for prompt in prompts])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data (dummy weights, prompts, references), a class teacher with a 1-step student, a text pipeline."""
    root = tmp_path_factory.mktemp("standard")
    pipeline = tiny_dit()
    pipeline.save_pretrained(root / "teacher")
    with torch.no_grad():
        next(pipeline.transformer.parameters()).mul_(1.1)
    pipeline.scheduler = LCMScheduler.from_config(
        pipeline.scheduler.config, original_inference_steps=1, clip_sample=False
    )
    pipeline.save_pretrained(root / "student")
    facts = {"teacher": str(root / "teacher"), "guidance": 2.0, "method": "dmd2", "steps": 1, "sampler": "renoise"}
    (root / "student" / "stepdistill.json").write_text(json.dumps(facts))
    data = root / "data"
    (data / "real" / "deeper").mkdir(parents=True)
    (data / "w.pth").write_bytes(b"weights")
    (data / "prompts.txt").write_text("a red shoe\nrain\n")
    generator = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(generator.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(
            data / "real" / ("deeper" if i else ".") / f"{i}.png"
        )
    np.savez(data / "moments.npz", mu=np.zeros(12), sigma=np.eye(12))
    return root


def protocol(root, name, **changes):
    view = {"network": "inception", "crop": "none", "weights": {"file": "w.pth", "sha256": None, "how": ""}}
    view["metrics"] = ["fid", "kid", "precision", "recall"]
    stated = {
        "id": name,
        "conditions": "any",
        "samples": SAMPLES,
        "seed": 3,
        "teacher": {"steps": 2, "guidance": None},
        "prompts": {"file": "prompts.txt", "sha256": None, "count": None, "how": "write it"},
        "views": {"inception": view},
        "kid": {"subsets": 2, "size": 20, "seed": 0},
        "neighbours": {"k": 3, "rows": 30},
    } | changes
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(stated, sort_keys=False))
    return path


@pytest.fixture
def measured(root, monkeypatch):
    monkeypatch.setattr(import_module("stepdistill.eval.bench.rows"), "load_view", lambda *_: Shrunk())
    monkeypatch.delenv("RANK", raising=False)

    def run(path, source="student", **options):
        stated = {"steps": (1,), "data": root / "data", "cache": root / "cache", "device": "cpu", "offline": True}
        stated |= {"solvers": False}
        return run_bench(root / source, protocol=path, **(stated | options))

    return run


@pytest.fixture(scope="module")
def double():
    """A text pipeline in float64: rounding to uint8 hides what a batch's size does to the last digits."""
    pipeline = tiny_sd().to(torch.float64)
    return Sampler("sd", "student", trace(pipeline), "w", ("a red shoe", "rain", ""), steps=2, guidance=2.0)


@pytest.mark.parametrize("batch", [7, 64])
def test_a_sample_depends_on_its_seed_and_index_alone(double, batch):
    numbers = range(10)
    alone = draw(double, numbers, 40, seed=3, batch=1)
    assert torch.equal(draw(double, numbers, 40, seed=3, batch=batch), alone)
    assert torch.equal(draw(double, numbers[6:8], 46, seed=3, batch=batch), alone[6:8])
    assert not torch.equal(draw(double, numbers[:2], 40, seed=4, batch=batch), alone[:2])


def test_metrics_do_not_depend_on_the_batch(root, measured, monkeypatch, tmp_path):
    monkeypatch.setattr("stepdistill.pipeline.open.load_pipeline", lambda *_, **__: tiny_dit().to(torch.float64))
    monkeypatch.setattr("stepdistill.eval.bench.rows.Bench.cost", lambda *_: {})
    view = {"network": "inception", "crop": "none", "metrics": ["fid", "kid", "inception_score"]}
    view["weights"] = {"file": "w.pth", "sha256": None, "how": ""}
    real = {"images": "five", "kind": "folder", "file": "real", "sha256": None, "count": 5, "how": ""}
    path = protocol(root, "batches", conditions="classes", views={"inception": view}, reference=real)
    rows, contents = [], []
    for batch in (1, 7, 64):
        cache = tmp_path / str(batch)
        rows += measured(path, source="teacher", batch=batch, cache=cache).rows
        contents.append({str(p.relative_to(cache)): p.read_bytes() for p in (cache / "samples").rglob("*.safetensors")})
    assert len(contents[0]) == 4 and all(content == contents[0] for content in contents)
    assert all(row.metrics == pytest.approx(rows[0].metrics, rel=1e-9) for row in rows)


def test_teacher_fid_of_a_student_is_against_its_teachers_samples(root, measured, tmp_path):
    path = protocol(root, "teacher-fid")
    report = measured(path, out=tmp_path)
    rows = {row.role: row for row in report.rows}
    assert list(rows) == ["teacher", "student"] and rows["teacher"].metrics == {} and rows["teacher"].nfe == 4
    stored = read_images(root)
    assert [len(images) for images in stored] == [SAMPLES, SAMPLES]
    moments = [
        Moments.of(Shrunk().rows(torch.stack([Shrunk().prepare(i) for i in images]))["rows"]) for images in stored
    ]
    assert rows["student"].metrics["fid"] == pytest.approx(frechet_distance(*moments), rel=1e-6)
    assert rows["student"].diagnostics["fid_error"] > 0
    assert {"latency_seconds", "seconds_per_image", "batch", "flops", "peak_memory_mib", "parameters"} == set(
        rows["student"].cost
    )
    # Both decode once; the teacher evaluates its network four times and the student once.
    evaluations, remainder = divmod(rows["teacher"].cost["flops"] - rows["student"].cost["flops"], 3)
    assert remainder == 0 and evaluations > 100_000
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Warning: at N = 80" in page and "pins.yaml" in page and "Latency ms" in page
    assert read_report(tmp_path).files == {"w.pth": report.files["w.pth"]}


def test_stock_solvers_are_measured_at_the_students_passes(root, measured, tmp_path):
    report = measured(protocol(root, "solvers", samples=20), solvers=True, out=tmp_path)
    solvers = [row for row in report.rows if row.role == "solver"]
    assert [(row.name, row.steps, row.nfe) for row in solvers] == [
        ("DDIM", 1, 1), ("DPM-Solver++", 1, 1), ("UniPC", 1, 1),
    ]  # fmt: skip
    assert all(row.metrics["fid"] > 0 and row.cost["flops"] > 0 for row in solvers)
    # The student and the best of them are shown, each with a caption and a text in the picture's place.
    assert (tmp_path / "index.html").read_text(encoding="utf-8").count("1 step, NFE 1 · FID@20") == 2 * 2


def test_a_solver_that_a_pipeline_cannot_run_under_is_left_out_and_named(root, measured, monkeypatch):
    module, real = import_module("stepdistill.eval.bench.run"), import_module("stepdistill.eval.bench.run").set_up

    def refusing(trace, scheduler, steps):
        if type(scheduler).__name__ == "UniPCMultistepScheduler":
            raise InputError("no sigmas")
        return real(trace, scheduler, steps)

    monkeypatch.setattr(module, "set_up", refusing)
    report = measured(protocol(root, "solvers", samples=20), solvers=True)
    assert [row.name for row in report.rows if row.role == "solver"] == ["DDIM", "DPM-Solver++"]
    assert "No row of UniPC: DiTPipeline does not run under UniPCMultistepScheduler: no sigmas" in report.remarks


def test_a_student_is_measured_again_against_another_teacher(root, measured, tmp_path):
    path = protocol(root, "teacher-fid", samples=20)
    shutil.copytree(root / "student", tmp_path / "student")
    facts = json.loads((tmp_path / "student" / "stepdistill.json").read_text())
    (tmp_path / "student" / "stepdistill.json").write_text(json.dumps(facts | {"guidance": 3.0}))
    weak, strong = (measured(path, source=source).rows[1] for source in (root / "student", tmp_path / "student"))
    assert weak.metrics["fid"] != strong.metrics["fid"]


@pytest.fixture
def added(monkeypatch):
    """LPIPS with random weights and a score that counts letters, under files that are there."""
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    network, files = Lpips(None), (FileSpec(file="w.pth", sha256=None),)
    letters = lambda images, prompts: torch.tensor([float(len(prompt)) for prompt in prompts])  # noqa: E731
    for name, loaded in (("lpips", network), ("pickscore", letters)):
        there = replace(ALSO[name], files=files, load=lambda *_, loaded=loaded, **__: loaded)
        monkeypatch.setitem(ALSO, name, there)
    return network


def test_lpips_is_between_a_prompts_images_and_to_the_teachers(root, measured, added):
    path = protocol(root, "lpips", samples=20, diversity={"prompts": 3, "images": 2})
    report = measured(path, also=["lpips"])
    teacher, student = report.rows
    assert "lpips_teacher" not in teacher.metrics and teacher.metrics["lpips_diversity"] > 0
    names = [path.parent for path in (root / "cache" / "samples").glob("*/images/0000000-20.safetensors")]
    (ours,) = [name for name in names if list(name.parent.glob("lpips-*-to-*"))]
    (tag,) = ours.parent.glob("lpips-*-to-*")
    (theirs,) = [name for name in names if name.parent.name.startswith(tag.name.rpartition("-")[2])]
    pairs = [Shards(folder, 20).all("images") for folder in (ours, theirs)]
    assert student.metrics["lpips_teacher"] == pytest.approx(float(added(*pairs).double().mean()), rel=1e-6)
    assert 0 < student.diagnostics["lpips_teacher_error"] < student.metrics["lpips_teacher"]
    repeats = Shards(ours.parent / "repeats-3", 6).all("images")
    by_hand = [float(added(repeats[i : i + 1], repeats[i + 3 : i + 4])) for i in range(3)]
    assert student.metrics["lpips_diversity"] == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert "LPIPS to the teacher's image" in report.to_markdown()
    with pytest.raises(InputError, match="also: pickscore needs a pipeline of prompts, found classes in teacher"):
        measured(path, also=["pickscore"])
    with pytest.raises(InputError, match=r"also: expected a protocol without classes.* found fashion-v1"):
        measured("fashion-v1", also=["lpips"])


def read_images(root):
    folders = sorted((root / "cache" / "samples").iterdir(), key=lambda folder: folder.stat().st_ctime)
    return [Shards(folder / "images", SAMPLES).all("images") for folder in folders]


def test_a_row_of_some_networks_is_not_the_whole_row(root, measured, tmp_path):
    view = {"network": "inception", "crop": "none", "weights": {"file": "w.pth", "sha256": None, "how": ""}}
    views = {"one": view | {"metrics": ["fid"]}, "two": view | {"metrics": ["kid"]}}
    real = {"images": "five", "kind": "folder", "file": "real", "sha256": None, "count": 5, "how": ""}
    kid = {"subsets": 2, "size": 5, "seed": 0}
    path = protocol(root, "two-views", conditions="classes", samples=8, views=views, reference=real, kid=kid)
    assert "kid" not in measured(path, networks=["one"], cache=tmp_path).rows[-1].metrics
    assert {"fid", "kid"} <= {*measured(path, cache=tmp_path).rows[-1].metrics}


def test_a_lost_shard_alone_is_drawn_again(root, measured, monkeypatch, tmp_path):
    module, drawn = import_module("stepdistill.eval.bench.samples"), []
    measured(protocol(root, "teacher-fid"), cache=tmp_path)
    lost = next((tmp_path / "samples").glob("*/images/*064-16.safetensors"))
    before = lost.read_bytes()
    lost.unlink()
    real = module.draw
    monkeypatch.setattr(
        module, "draw", lambda sampler, numbers, *a, **k: drawn.append(numbers) or real(sampler, numbers, *a, **k)
    )
    measured(protocol(root, "teacher-fid"), cache=tmp_path)
    assert drawn == [range(64, 80)] and lost.read_bytes() == before


def test_a_killed_benchmark_goes_on_with_the_bytes_of_one_that_was_not(root, measured, monkeypatch, tmp_path):
    path, module = protocol(root, "teacher-fid"), import_module("stepdistill.eval.bench.samples")
    whole, real, calls = measured(path), module.draw, []

    def killed(*args, **options):
        calls.append(args[1])
        if len(calls) == 4:  # the student's second shard
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(path, cache=tmp_path)
    resumed = measured(path, cache=tmp_path)
    assert calls == [range(64), range(64, 80), range(64), range(64, 80), range(64, 80)]
    assert [row.metrics for row in resumed.rows] == [row.metrics for row in whole.rows]
    for file in (tmp_path / "samples").glob("*/images/*"):
        assert file.read_bytes() == (root / "cache" / file.relative_to(tmp_path)).read_bytes()


def worker(rank, processes, port, run):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    PartialState(cpu=True)
    run()


KEPT = {}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_make_the_samples_and_metrics_of_one(root, measured, added, processes, tmp_path):
    path = protocol(root, "together", diversity={"prompts": 2, "images": 3})
    if "alone" not in KEPT:
        KEPT["alone"] = measured(path, also=["lpips"])
    alone = KEPT["alone"]
    out = {"cache": tmp_path / "cache", "out": tmp_path / "report"}
    port = 20_000 + os.getpid() % 20_000 + processes
    torch.multiprocessing.start_processes(
        worker, (processes, port, lambda: measured(path, also=["lpips"], **out)), nprocs=processes, start_method="fork"
    )
    together = read_report(tmp_path / "report")
    assert together.device.endswith(f"× {processes}")
    assert {row.machine for row in together.rows} == {together.device}
    for ours, theirs in zip(together.rows, alone.rows, strict=True):
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-9)

    def images(cache):
        return {str(p.relative_to(cache)): p.read_bytes() for p in (cache / "samples").rglob("*.safetensors")}

    one, several = images(root / "cache"), images(tmp_path / "cache")
    assert several and all(one[name] == content for name, content in several.items())


def test_prompts_diversity_and_a_folder_of_real_images(root, measured, added, tmp_path):
    pipeline = tiny_sd()
    pipeline.save_pretrained(root / "text")
    view = {
        "network": "clip",
        "arch": "a",
        "pretrained": "p",
        "crop": "none",
        "metrics": ["clip_score", "diversity", "cmmd"],
    }
    view["weights"] = {"file": "w.pth", "sha256": None, "how": ""}
    real = {"images": "five", "kind": "folder", "file": "real", "sha256": None, "count": 5, "how": ""}
    changes = {"views": {"clip": view}, "reference": real, "diversity": {"prompts": 2, "images": 3}, "samples": 6}
    path = protocol(root, "text", conditions="prompts", **changes)
    (row,) = measured(path, source="text", out=tmp_path, also=["pickscore"], batch=4).rows
    assert set(row.metrics) == {"clip_score", "diversity", "cmmd", "pick_score"}
    assert all(np.isfinite(list(row.metrics.values())))
    assert row.metrics["pick_score"] == (len("a red shoe") + len("rain")) / 2
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "One prompt a row" in page and "The worst of its samples" in page
    with pytest.raises(InputError, match="needs a pipeline of prompts, found DiTPipeline"):
        measured(path, source="teacher")
    changes["reference"] = real | {"count": 6}
    with pytest.raises(InputError, match="real: protocol text expects 6 images, found 5"):
        measured(protocol(root, "text", conditions="prompts", **changes), source="text")


def test_a_teacher_with_its_guidance_inside_runs_without_and_under_every_solver(root, measured, monkeypatch):
    # Loaded from disk it would make pictures of its default size.
    monkeypatch.setattr(import_module("stepdistill.pipeline.open"), "load_pipeline", lambda *_, **__: tiny_flux())
    view = {"network": "inception", "crop": "none", "metrics": ["fid"]}
    view["weights"] = {"file": "w.pth", "sha256": None, "how": ""}
    changes = {"views": {"inception": view}, "samples": 4, "teacher": {"steps": 3, "guidance": 5.0}}
    report = measured(protocol(root, "flux", **changes), source="flux", steps=(2,), solvers=True, batch=2)
    assert [(row.name, row.nfe) for row in report.rows] == [
        ("flux w=5", 3), ("Euler", 2), ("DPM-Solver++", 2), ("UniPC", 2),
    ]  # fmt: skip
    assert "flux: FluxPipeline takes its guidance as an input of its network, here 5." in report.remarks


def test_a_teacher_is_called_and_guided_as_its_student_was(root, measured, monkeypatch):
    """``teacher.arguments`` and, inside the network, the scale come from the student's recipe."""
    module, seen = import_module("stepdistill.eval.bench.samples"), []
    monkeypatch.setattr("stepdistill.pipeline.open.load_pipeline", lambda *_, **__: tiny_flux())
    monkeypatch.setattr(
        module, "draw", lambda sampler, *a, **k: seen.append(sampler) or torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    )
    folder = root / "flux-student"
    folder.mkdir()
    facts = {"teacher": "flux", "guidance": 7.0, "method": "dmd2", "steps": 1}
    facts["recipe"] = {"teacher": {"arguments": {"height": 16, "width": 16}}}
    (folder / "stepdistill.json").write_text(json.dumps(facts))
    (folder / "model_index.json").write_text("{}")
    changes = {"samples": 4, "teacher": {"steps": 3, "guidance": None}}
    measured(protocol(root, "flux-pair", **changes), source="flux-student", batch=4)
    assert [(one.role, one.trace.call_settings, one.guidance) for one in seen] == [
        (role, {"height": 16, "width": 16, "guidance inside": 7.0}, 1.0) for role in ("teacher", "student")
    ]
    assert seen[0].trace.latent_shape == seen[1].trace.latent_shape


def test_steps_that_a_scheduler_does_not_take_have_no_row_but_a_remark(root, measured):
    report = measured(protocol(root, "teacher-fid"), steps=(1, 2, 4))
    assert [(row.role, row.steps) for row in report.rows] == [("teacher", 2), ("student", 1)]
    assert any("no row at 2 and 4 steps; its LCMScheduler was made for 1" in remark for remark in report.remarks)


def test_stored_moments_are_enough_for_fid_and_rows_of_other_files_are_not_merged(root, measured):
    view = {"network": "inception", "crop": "none", "resize": "tf1", "metrics": ["fid", "inception_score"]}
    view["weights"] = {"file": "w.pth", "sha256": None, "how": ""}
    real = {"images": "a Gaussian", "kind": "moments", "file": "moments.npz", "sha256": None, "count": 9, "how": ""}
    changes = {"views": {"inception": view}, "reference": real, "samples": 6}
    path = protocol(root, "moments", conditions="classes", **changes)
    report = measured(path, source="student")
    assert report.verdict and "FID@6" in report.verdict[0].text
    assert report.rows[0].metrics["inception_score"] >= 1
    other = copy.deepcopy(report)
    other.files["w.pth"] = "another"
    with pytest.raises(InputError, match=r"different w\.pth cannot stand in one table"):
        merge([report, other])


def test_wrong_numbers_and_missing_files_are_refused(root, measured, tmp_path):
    path = protocol(root, "teacher-fid")
    with pytest.raises(InputError, match="batch: expected a number from 1 to 64, found 65"):
        measured(path, batch=65)
    with pytest.raises(InputError, match=r"w\.pth is missing"):
        measured(path, data=tmp_path)
    with pytest.raises(InputError, match="steps: expected numbers of at least 1"):
        measured(path, steps=(0,))
