"""Pictures read back from a report's page, where alone they are kept."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from stepdistill.text_files import read_text

_PNG = "data:image/png;base64,"

Pictures = list[tuple[str, Image.Image]]
"""(caption, picture) in the page's order."""


def stored_pictures(page: Path) -> dict[str, Pictures]:
    """The figures of an index.html by their section's ``data-section``; empty where there is no page."""
    if not page.is_file():
        return {}
    reader = _Reader()
    reader.feed(read_text(page))
    return reader.sections


class _Reader(HTMLParser):
    """Every figure is a caption and then a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: dict[str, Pictures] = {}
        self.section, self.caption, self.inside = "", "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        stated = {name: value or "" for name, value in attrs}
        if "data-section" in stated:
            self.section = stated["data-section"]
        elif tag == "figcaption":
            self.caption, self.inside = "", True
        elif tag == "img" and self.section and stated.get("src", "").startswith(_PNG):
            picture = Image.open(io.BytesIO(base64.b64decode(stated["src"].removeprefix(_PNG))))
            self.sections.setdefault(self.section, []).append((self.caption.strip(), picture))

    def handle_data(self, data: str) -> None:
        self.caption += data if self.inside else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "figcaption"
        self.section = "" if tag == "section" else self.section
