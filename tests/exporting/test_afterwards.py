"""What train prints at its end."""

import base64
import json
from pathlib import Path

from PIL import Image

from stepdistill.exporting.afterwards import afterwards, as_html
from stepdistill.exporting.card import PLACE


def test_the_end_of_a_run_says_what_to_type(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    assert afterwards(run) == ""
    (run / "export").mkdir(parents=True)
    facts = {"teacher": "t", "guidance": 1.5, "method": "sfd", "steps": 3}
    (run / "export" / "stepdistill.json").write_text(json.dumps(facts))
    (run / "export" / "README.md").write_text(f'text\n```python\npipe = load("{PLACE}")\n```\n')
    text = afterwards(run)
    assert f'    pipe = load("{run / "export"}")' in text
    assert f"stepdistill sample '{run}' --steps 3 --out grid.png" in text and f"stepdistill demo '{run}'" in text
    assert "tensorboard" not in text
    (run / "tensorboard").mkdir()
    assert f"tensorboard --logdir '{run / 'tensorboard'}'" in afterwards(run)


def test_a_notebook_shows_the_newest_preview_and_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "previews").mkdir()
    (tmp_path / "export").mkdir()
    facts = {"teacher": "t", "guidance": 1.5, "method": "sfd", "steps": 3}
    (tmp_path / "export" / "stepdistill.json").write_text(json.dumps(facts))
    for number, width in ((1, 3), (2, 5)):
        Image.new("L", (width, 2)).save(tmp_path / "previews" / f"{number:06d}.png")
    newest = base64.b64encode((tmp_path / "previews" / "000002.png").read_bytes()).decode()
    shown = as_html(tmp_path)
    assert newest in shown and shown.count("<img") == 1 and "stepdistill sample" in shown
