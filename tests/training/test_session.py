"""Switches of how networks run: the same numbers, and one clear error; and the data that a recipe names."""

import io
import tarfile

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from PIL import Image

from pipeline.tiny import save_dit, tiny_dit, tiny_sd
from stepdistill.errors import InputError
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.pipeline.set_up import passes
from stepdistill.planning import plan
from stepdistill.recipe import load
from stepdistill.training.run_samples import diffuse
from stepdistill.training.session import Session, build, build_without_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "tiny"
    save_dit(tiny_dit(), path)
    return path


@pytest.fixture(autouse=True)
def same_backend_afterwards(monkeypatch):
    """diffusers keeps the active backend for the whole process."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


def session(folder, **keys) -> Session:
    recipe = {
        "teacher": {"pipeline": str(folder), "guidance": {"scale": 1.5}},
        "student": {"steps": 2},
        "method": {"name": "dmd2", "critic_steps": 1},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3, **keys},
    }
    return build(load(recipe), torch.device("cpu"))


def write_shard(file, names, colours) -> None:
    """Pictures with their class numbers, and one that is broken."""
    with tarfile.open(file, "w") as archive:
        for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
            picture = io.BytesIO()
            Image.new("L", (32, 32), colour).save(picture, format="PNG")
            members = {"png": picture.getvalue(), "cls": name.encode()} if name else {"png": b"", "cls": b"0"}
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_prompts_that_are_not_read_to_the_end_are_counted_in_one_line(tmp_path, capsys):
    save_pipeline(tiny_sd(), tmp_path / "sd")
    recipe = {
        "teacher": {"pipeline": str(tmp_path / "sd")},
        "student": {"steps": 2, "train": "lora", "rank": 2},
        "data": {"conditions": ["rain " * 9 + "umbrella", "rain", "rain " * 11 + "umbrella"]},
        "method": {"name": "sfd"},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    capsys.readouterr()
    build(load(recipe), torch.device("cpu"))
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("data.conditions")]
    assert line.startswith("data.conditions: 2 of 3 prompts are longer than the pipeline reads; it does not see “")
    assert line.endswith(f"umbrella” of “{recipe['data']['conditions'][2]}”")


@pytest.mark.parametrize("conditions", ["classes", "captions"])
def test_shards_of_images_with_class_numbers(folder, tmp_path, conditions, capsys):
    write_shard(tmp_path / "a.tar", ["7", "3", "", "7"], [0, 100, 0, 200])
    recipe = {
        "teacher": {"pipeline": str(folder)},
        "student": {"steps": 2},
        "data": {"images": str(tmp_path), "conditions": conditions, "max_rejected": 0.25},
        "method": {"name": "tcd"},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    built = build(load(recipe), torch.device("cpu"))
    latents, index = built.rows
    assert [built.conditioning.entries[i] for i in index.tolist()] == [7, 3, 7]
    assert len(latents) == 3 and not torch.equal(latents[0], latents[2])
    assert len(built.conditioning) == (10 if conditions == "classes" else 2)
    assert capsys.readouterr().err.count("data.images: 1 of 4 samples rejected (1 unreadable image)") == 1
    if conditions == "captions":
        recipe["data"]["max_rejected"] = 0.1
        with pytest.raises(InputError, match=r"more than data\.max_rejected, 0\.1"):
            build(load(recipe), torch.device("cpu"))
    else:
        assert plan.plan(recipe).stored > 3 * latents[0].numel() * 4


def test_prompts_of_a_jsonl(tmp_path):
    save_pipeline(tiny_sd(), tmp_path / "teacher")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red shoe"}\n{"prompt": "rain"}\n{"prompt": "rain"}\n')
    recipe = {
        "teacher": {"pipeline": str(tmp_path / "teacher"), "guidance": {"scale": 2.0}},
        "student": {"steps": 2},
        "data": {"conditions": str(tmp_path / "prompts.jsonl")},
        "method": {"name": "sfd", "substeps": 2},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    assert build_without_data(load(recipe), torch.device("cpu")).conditioning.entries == ("a red shoe", "rain")


@pytest.mark.parametrize("method", [{"name": "dmd2", "gan_weight": 0.1}, {"name": "senseflow"}, {"name": "disback"}])
def test_an_exports_session_lacks_roles_that_the_method_looks_at(method, folder):
    recipe = {
        "teacher": {"pipeline": str(folder)},
        "student": {"steps": 2},
        "data": {"images": str(folder)} if "gan_weight" in method else {},
        "method": method,
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    roles = build_without_data(load(recipe), torch.device("cpu")).method.roles
    assert [name for name, _ in roles.items()] == ["teacher", "student"]


def loss(built: Session) -> torch.Tensor:
    return built.method.losses("student", built.batch(0, 0, 2))["dm"].detach()


def test_switches_of_how_networks_run_change_no_number(folder):
    plain, other = session(folder), session(folder, channels_last=True, attention_backend="native")
    weight = next(p for p in other.method.roles.student.network.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(loss(plain), loss(other))


@pytest.mark.parametrize("backend,problem", [("natve", "must be one of the following"), ("flash_hub", "from the hub")])
def test_a_backend_that_is_not_there(folder, backend, problem):
    with pytest.raises(InputError, match=rf"train\.attention_backend: .*{problem}"):
        session(folder, attention_backend=backend)


def test_a_time_shift_is_for_flow_alone(folder):
    recipe = {
        "teacher": {"pipeline": str(folder)},
        "student": {"steps": 2},
        "method": {"name": "dmd2", "time_shift": 3.0},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    with pytest.raises(InputError, match=r"method\.time_shift: expected 1 for a vp_discrete schedule, found 3"):
        build_without_data(load(recipe), torch.device("cpu"))


def test_guidance_in_an_interval_reaches_method_previews_and_trajectories(folder):
    def built(**guidance):
        recipe = {
            "teacher": {"pipeline": str(folder), "guidance": {"scale": 3.0, **guidance}},
            "student": {"steps": 2},
            "method": {"name": "dmd2", "critic_steps": 1},
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
        }
        return build(load(recipe), torch.device("cpu"))

    plain, limited = built(), built(interval=[0.3, 0.6])
    batch = plain.batch(0, 0, 2)
    for time, same in ((0.9, False), (0.5, True)):
        t = torch.full((2,), time, dtype=torch.float64)
        found, guided, unguided = (
            session.method.teacher(batch.noise("x"), t, batch, scale).raw
            for session, scale in ((limited, None), (plain, None), (plain, 1.0))
        )
        torch.testing.assert_close(found, guided if same else unguided)
    latents = diffuse(limited, "teacher", 2, seed=0)
    assert not torch.allclose(latents, diffuse(plain, "teacher", 2, seed=0))
    scheduler = plain.trace.pipeline.scheduler
    assert passes(plain.trace, scheduler, 10, 3.0) == 20 and passes(limited.trace, scheduler, 10, 1.0) == 10
    assert passes(limited.trace, scheduler, 10, 3.0) == 13


def test_networks_that_will_be_shared_out_wait_for_it(folder, tmp_path):
    write_shard(tmp_path / "a.tar", ["7", "3"], [0, 100])
    recipe = {
        "teacher": {"pipeline": str(folder)},
        "student": {"steps": 2},
        "data": {"images": str(tmp_path / "a.tar")},
        "method": {"name": "dmd2", "gan_weight": 0.1},
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
    }
    made = build(load(recipe), torch.device("cpu"), shared=True)
    assert made.method.gan.heads is None
    made.prepare()
    assert made.method.gan.heads is not None
