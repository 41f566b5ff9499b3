"""The demo: what may be typed, what is drawn beside what, what the page says; gradio's part where it is installed."""

import base64
import functools
import io
import json
import re
import socket
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from pipeline.tiny import CLASSES, save_dit, tiny_dit, tiny_sd
from stepdistill import assets, cli
from stepdistill.demo.content import VOCABULARY, Demo, Drawn, load_demo, words_of
from stepdistill.demo.shown import answers, sheet, strip_html
from stepdistill.demo.watching import check_run, watch_html
from stepdistill.errors import InputError
from stepdistill.eval.bench.drawing import Sampler, draw
from stepdistill.files import write_text
from stepdistill.pipeline.folder import save_pipeline
from stepdistill.training.runs import heartbeat

TEACHER_STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def _hasty():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill.demo.content.TEACHER_STEPS", TEACHER_STEPS)
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """An export as of a student of two steps, whose scheduler refuses more; a DiT of classes."""
    folder = tmp_path_factory.mktemp("classes")
    save_dit(tiny_dit(), folder / "teacher")
    pipeline = tiny_dit()
    few = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=2)
    pipeline.register_modules(scheduler=few)
    save_dit(pipeline, folder / "run" / "export")
    facts = {"teacher": str(folder / "teacher"), "guidance": 1.5, "method": "lcm", "steps": 2}
    (folder / "run" / "export" / "stepdistill.json").write_text(json.dumps(facts))
    return folder / "run" / "export"


@pytest.fixture(scope="module")
def classes(student) -> Demo:
    return load_demo(student)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A LoRA as exported, on a tiny Stable Diffusion that carries its vocabulary."""
    folder = tmp_path_factory.mktemp("prompts")
    pipeline = tiny_sd()
    save_pipeline(pipeline, folder / "teacher")
    (folder / "teacher" / VOCABULARY).write_text("A\nred\nshoe\nrain\no'clock\n", encoding="utf-8")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers)
    pipeline.scheduler.save_pretrained(folder / "lora" / "scheduler")
    facts = {"teacher": str(folder / "teacher"), "guidance": 2.0, "method": "sfd", "steps": 2}
    facts["recipe"] = {"data": {"conditions": ["a red shoe", "rain"]}}
    (folder / "lora" / "stepdistill.json").write_text(json.dumps(facts))
    return folder / "lora"


@pytest.fixture(scope="module")
def prompts(lora) -> Demo:
    return load_demo(lora)


def test_pictures_of_another_size(lora):
    drawn = [stage[-1] for stage in load_demo(lora, size=(16, 24)).draw("rain", 0)][-1]
    assert drawn.image.shape == (3, 16, 24)


def test_a_class_is_named_or_numbered(classes):
    assert (classes.input_kind, classes.classes, classes.examples) == ("class", CLASSES, list(CLASSES))
    assert [classes.read(text) for text in ("Bag", " ankle  BOOT ", "3")] == [(8, ""), (9, ""), (3, "")]


def test_a_wrong_class_is_answered_with_the_known_ones(classes):
    for text, meant in (("snekaer", "Sneaker"), ("boot", "Ankle boot"), ("10", None), ("<b>", None)):
        entry, hint = classes.read(text)
        assert entry is None and f"no class “{text}”" in hint and hint.endswith(", ".join(CLASSES) + ".")
        assert ("Did you mean" in hint) == (meant is not None) and (meant or "") in hint.partition("Known")[0]
    assert classes.read("") == classes.read(None) == (None, "Type a class.")


def test_every_picture_starts_from_the_same_noise(classes):
    assert [(one.role, one.steps, one.nfe) for one in classes.samplers] == [
        ("teacher", TEACHER_STEPS, 2 * TEACHER_STEPS),
        ("student", 1, 1),
        ("student", 2, 2),
    ]
    stages = list(classes.draw(8, seed=5))
    assert [[one is not None for one in stage] for stage in stages] == [[0, 1, 0], [0, 1, 1], [1, 1, 1]]
    again, other = (list(classes.draw(8, seed))[-1] for seed in (5, 6))
    for sampler, one, same, new in zip(classes.samplers, stages[-1], again, other, strict=True):
        alone = Sampler("", "", sampler.trace, "", (8,), sampler.steps, sampler.guidance)
        assert torch.equal(one.image, draw(alone, [0], 0, seed=5, batch=1)[0])
        assert torch.equal(one.image, same.image) and not torch.equal(one.image, new.image)
        assert one.nfe == sampler.nfe and one.seconds > 0


def test_the_teacher_may_have_moved(student, tmp_path):
    (student.parents[1] / "teacher").rename(tmp_path / "here")
    try:
        with pytest.raises(InputError, match=r"pipeline .*teacher: expected a folder"):
            load_demo(student)
        assert load_demo(student, tmp_path / "here").samplers[0].name == "here"
    finally:
        (tmp_path / "here").rename(student.parents[1] / "teacher")


def test_a_lora_of_prompts_is_drawn_beside_its_teacher(prompts):
    assert (prompts.input_kind, prompts.examples) == ("prompt", ["a red shoe", "rain"])
    assert [one.nfe for one in prompts.samplers] == [2 * TEACHER_STEPS, 1, 2, 4]
    entry, hint = prompts.read("a red shoe")
    assert (entry, hint) == ("a red shoe", "")
    pictures = list(prompts.draw(entry, 0))[-1]
    assert all(one.image.shape == (3, 16, 16) for one in pictures)
    teacher = replace(prompts.samplers[0], entries=(entry,), steps=2, guidance=1.0)
    assert not torch.equal(draw(teacher, [0], 0, seed=0, batch=1)[0], pictures[2].image)  # the LoRA is in it
    assert prompts.title == "The teacher, teacher, needs 3 steps with guidance 2; its student was trained for 2 steps"


def test_unknown_words_are_named_and_drawn_all_the_same(prompts):
    assert prompts.words == {"a", "red", "shoe", "rain", "o'clock"}
    entry, hint = prompts.read("A red shoo, qqq at 12 O’Clock & shoo")
    assert entry == "A red shoo, qqq at 12 O’Clock & shoo"
    assert "never seen “shoo” (closest: shoe), “qqq”, “at”" in hint and "clock" not in hint and hint.count("shoo") == 1
    assert "“12”: expect little" in hint
    assert prompts.about == "The teacher knows 5 words, such as rain, shoe."


def test_the_end_of_a_long_prompt_is_named(prompts):
    # Letters are tokens here, of which there is room for 38.
    entry, hint = prompts.read(" ".join(["rain"] * 11))
    assert entry and "the end is not read: “" in hint
    assert words_of(hint.partition("“")[2])[-1] == "rain"
    assert prompts.read(" ".join(["rain"] * 9))[1] == ""


def test_the_shipped_student_knows_emoji_and_says_what_it_does_not():
    demo = load_demo(assets.find("students/emoji"))
    assert set(demo.examples) <= set(assets.prompts("emoji").read_text().splitlines()) and len(demo.examples) == 16
    assert all(demo.read(one)[1] == "" for one in demo.examples)
    assert "never seen “zebraa” (closest: zebra)" in demo.read("flat emoji of zebraa")[1]
    pictures = list(demo.draw("3d emoji of red heart", 0))[-1]
    assert [one.image.shape for one in pictures] == [(3, 64, 64)] * len(demo.samplers)
    red, green, blue = pictures[-1].image[:, 24:40, 24:40].float().mean((1, 2))
    assert red > 150 and red > 2 * green and red > blue


def test_the_page_says_what_it_shows(classes):
    image = torch.zeros(1, 32, 32, dtype=torch.uint8)
    drawn = [None, Drawn(image, 1, 0.125), Drawn(torch.zeros(3, 600, 300, dtype=torch.uint8), 2, 12.0)]
    shown = strip_html(classes, drawn, "Bag, seed 3", "no class “<b>”", busy=True)
    assert (
        "no class “&lt;b&gt;”" in shown
        and ">Bag, seed 3<" in shown
        and shown.count("<figure>") == 3
        and shown.count("<img") == 2
    )
    assert f"Teacher</b><br>{TEACHER_STEPS} steps<" in shown
    assert (
        "Student</b><br>1 step · 1 network pass · 0.12 s" in shown and "2 steps · 2 network passes · 12.00 s" in shown
    )
    drawn[0] = Drawn(image, 6, 2.5)
    assert "0.12 s<br>20× faster, 6.0× fewer passes" in strip_html(classes, drawn) and "faster" not in shown
    assert 'width="256" height="256" class="enlarged"' in shown and 'width="300" height="600" class="whole"' in shown
    assert "busy" in shown and "busy" not in strip_html(classes, drawn) and "hint" not in strip_html(classes, drawn)


def test_steps_guidance_and_seed_are_chosen_where_they_mean_something(classes, prompts):
    assert (classes.few, classes.guidance, prompts.few, prompts.guidance) == ((1, 2), 1.5, (1, 2, 3, 4, 6, 8), 2.0)
    chosen = classes.with_settings(2, 4.0, [2])
    assert [(one.steps, one.guidance, one.nfe) for one in chosen.samplers] == [(2, 4.0, 4), (2, 1.0, 2)]
    assert [one.steps for one in prompts.with_settings(5, None, [6, 3]).samplers] == [5, 3, 6]
    teacher, student = (
        [list(one.draw(8, 0))[-1][k].image for one in (chosen, classes.with_settings(2))] for k in (0, -1)
    )
    assert not torch.equal(*teacher) and torch.equal(*student)  # guidance is the teacher's alone
    alone = replace(classes.samplers[0].trace, guidance=replace(classes.samplers[0].trace.guidance, kind="none"))
    unguided = replace(classes, samplers=(replace(classes.samplers[0], trace=alone, guidance=1.0), classes.samplers[1]))
    assert unguided.guidance is None and unguided.with_settings(2, 4.0).samplers[0].guidance == 1
    for settings, said in (
        ((0,), "expected 1 to 100, found 0"),
        ((2, -1.0), "found -1"),
        ((2, 1.0, [3]), "expected 1, 2, found 3"),
    ):
        with pytest.raises(InputError, match=said):
            classes.with_settings(*settings)
    (shown,) = answers(classes, "Bag", 0, 101)
    assert "found 101" in shown and "<img" not in shown
    *_, last = answers(classes, " bag ", None, None, 4.0, ["2"])
    assert ">Bag, seed 0<" in last and last.count("<img") == 2 and "guidance 4<" in last


def test_a_comparison_is_saved_as_one_picture(classes):
    pair = classes.with_settings(3, 1.5, [2])
    colours = [torch.full((3, 100, 80), value, dtype=torch.uint8) for value in (200, 50)]
    drawn = [Drawn(colours[0], 6, 2.5), Drawn(colours[1], 2, 0.5)]
    page = sheet(pair, drawn, "Bag, seed 3")
    assert page.width == 16 + 2 * (256 + 16)
    assert [page.getpixel((x, 16 + y)) for x, y in ((16, 0), (175, 199), (288, 0), (447, 199))] == [
        *[(200, 200, 200)] * 2,
        *[(50, 50, 50)] * 2,
    ]
    written = page.crop((0, 16 + 200, page.width, page.height)).convert("L")
    assert written.getextrema()[0] < 60 and page != sheet(pair, drawn, "Bag, seed 4")
    longer = sheet(pair, drawn, "a word " * 40)
    assert longer.width == page.width and longer.height > page.height
    whole, part = strip_html(pair, drawn, "A <b>, seed 3"), strip_html(pair, [None, drawn[1]], "A", busy=True)
    assert "Save comparison" not in part and 'download="a-b-seed-3.png">Save comparison</a>' in whole
    coded = re.search(r'href="data:image/png;base64,([^"]+)"', whole)[1]
    assert Image.open(io.BytesIO(base64.b64decode(coded))).size == page.size


def test_a_run_is_watched_from_what_it_has_written(tmp_path):
    run = tmp_path / "shoes"
    with pytest.raises(InputError, match="expected a run folder"):
        check_run(run)
    write_text(run / "recipe.yaml", "method: {name: sfd}\ntrain: {steps: 9}\n")
    heartbeat(run, 0, "preparing", "encoding <prompts>")
    check_run(run)
    assert "encoding &lt;prompts&gt; · step 0 of 9" in watch_html(run) and "No preview yet" in watch_html(run)
    write_text(run / "metrics.jsonl", '{"step": 4, "student/loss/sfd": 0.25}\n{"step": 5, "student/l')
    (run / "previews").mkdir()
    Image.new("L", (4, 4)).save(run / "previews" / "000003.png")
    (run / "previews" / "000004.png").write_bytes(b"half")
    heartbeat(run, 4, "training")
    shown = watch_html(run)
    assert "running · step 4 of 9" in shown and "student sfd 0.25" in shown and shown.count("<img") == 2
    assert "Preview after step 3" in shown


def test_what_is_no_student_is_refused(student, lora):
    with pytest.raises(InputError, match=r"a student, found .*teacher without stepdistill.json"):
        load_demo(student.parents[1] / "teacher")
    with pytest.raises(InputError, match="which draws something else"):
        load_demo(student, lora.parent / "teacher")


def test_a_missing_gradio_is_one_line(student, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "stepdistill.demo.page", raising=False)
    assert cli.run(["demo", str(student)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: demo: needs gradio (pip install -e '.[demo]')")


def test_the_page_in_gradio_asks_nobody_else(classes, monkeypatch):
    gradio_client = pytest.importorskip("gradio_client")
    original, called = socket.socket.connect, []

    @functools.wraps(original)
    def noted(self, address):
        called.append(address[0] if self.family != socket.AF_UNIX else "127.0.0.1")
        return original(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    from stepdistill.demo.page import launch, page

    blocks = page(classes)
    url = launch(blocks, None)
    try:
        served = urllib.request.urlopen(url).read().decode() + urllib.request.urlopen(f"{url}theme.css").read().decode()
        assert "fonts.googleapis" not in served and "system-ui" in served
        client = gradio_client.Client(url, verbose=False)
        last = client.predict("bagg", 0, 2, 1.5, ["1"], fn_index=0)
        assert "Did you mean Bag?" in last
        assert client.predict("Bag", 0, 2, 4.0, ["2"], fn_index=0).count("<img") == 2
        with pytest.raises(InputError, match=r"--port: expected a free port, found \d+ taken"):
            launch(page(classes), int(url.rstrip("/").rpartition(":")[2]))
    finally:
        blocks.close()
    assert set(called) == {"127.0.0.1"}
