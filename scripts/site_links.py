"""Hooks of mkdocs: what the pages link to outside docs/ is in the repository, and not on the site.

Links become text with the file's place; pictures are taken along. Roles of Sphinx in docstrings become code. Names in
tables may break behind a dot, a slash or an underscore.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+://)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures that pages show from outside docs/."""
    for page in list(files.documentation_pages()):
        for found in LINK.finditer(page.content_string):
            place = _outside(page.src_uri, found[3], files)
            if found[1] and place is not None and (source := _taken(place)) not in files.src_uris:
                files.append(File.generated(config, source, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links that lead out of the site."""

    def replaced(found: re.Match) -> str:
        place = _outside(page.file.src_uri, found[3], files)
        if place is None:
            return found[0]
        if found[1]:
            return f"![{found[2]}]({_taken(place)})"
        return found[2] if found[2] == str(place) else f"{found[2]} (`{place}` in the repository)"

    return LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Drop the roles of docstrings (``:func:`train```), and the dots and modules before a name."""
    return re.sub(r":\w+:<code>(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Mark where names in tables may break; after the search has read the page, whose words they would cut."""
    breaking = lambda code: re.sub(r"(?<=\w)(::|[._/=(,])(?=[^\W\d])", r"\1<wbr>", code[0])  # noqa: E731
    return re.sub(r"<td.*?</td>", lambda cell: re.sub(r"(?<=<code>)[^<]+", breaking, cell[0]), output, flags=re.DOTALL)


def _outside(page: str, target: str, files: Files) -> PurePosixPath | None:
    """The target's place in the repository, where it exists and is no file of the site: mkdocs judges the others."""
    path = Path(os.path.normpath((ROOT / "docs" / page).parent / target))
    if not path.exists():
        return None
    place = path.relative_to(ROOT)
    known = files.get_file_from_path(place.relative_to("docs").as_posix()) if place.parts[0] == "docs" else None
    return None if known is not None and known.inclusion.is_included() else PurePosixPath(place.as_posix())


def _taken(place: PurePosixPath) -> str:
    return f"pictures/{place}"
