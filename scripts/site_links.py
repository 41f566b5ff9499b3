"""Hooks of mkdocs: what the pages link to outside docs/ is in the repository, and not on the site.

The repository's address is REPOSITORY_URL, or what the CI of GitHub or GitLab says, so a fork's pages lead to the fork.
Where it is known, pages have it at their top, links out of the site lead into it, and the notebook's page opens it in
Colab. Where it is not, links become text with the file's place. Pictures are taken along. Roles of Sphinx in docstrings
become code. Names in tables may break behind a dot, a slash or an underscore.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
NOTEBOOK = "docs/examples/quickstart.ipynb"
COLAB = "<!-- colab -->"
"""On a page: what is replaced by the way to Colab, which knows repositories on GitHub alone."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+://)([^)#\s]+)(#[^)\s]*)?\)")


def repository(environment: Mapping[str, str] = os.environ) -> str:
    """The repository's address without a slash at its end; empty where nothing says it."""
    address = environment.get("REPOSITORY_URL") or environment.get("CI_PROJECT_URL") or ""
    if not address and environment.get("GITHUB_REPOSITORY"):
        address = f"{environment.get('GITHUB_SERVER_URL') or 'https://github.com'}/{environment['GITHUB_REPOSITORY']}"
    return address.rstrip("/").removesuffix(".git")


def colab(address: str) -> str:
    """The badge that opens the notebook in Colab, and what its first cell needs there; empty outside GitHub."""
    host, _, name = address.partition("//github.com/")
    if host != "https:" or not name:
        return ""
    place = f"https://colab.research.google.com/github/{name}/blob/HEAD/{NOTEBOOK}"
    return (
        f'<a class="md-button" href="{place}">Open in Colab</a>\n\n'
        f'There, the first cell is `package = "stepdistill[eval] @ git+{address}"`.'
    )


def on_config(config: Any) -> Any:
    """Say where the repository is, in every page's header."""
    config.repo_url = repository() or None
    config.repo_name = "/".join(config.repo_url.split("/")[-2:]) if config.repo_url else None
    return config


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
        if config.repo_url:
            return f"[{found[2]}]({config.repo_url}/blob/HEAD/{place}{found[4] or ''})"
        return found[2] if found[2] == str(place) else f"{found[2]} (`{place}` in the repository)"

    return LINK.sub(replaced, markdown).replace(COLAB, colab(config.repo_url or ""))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Drop the roles of docstrings (``:func:`train```), and the dots and modules before a name."""
    return re.sub(r":\w+:<code>(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """Keep the theme's script from asking the repository's host for its stars: nothing is fetched from elsewhere."""
    return output.replace(' data-md-component="source"', "")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Mark where names in tables may break; after the search has read the page, whose words they would cut."""
    output = on_post_template(output, page.url, config)
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
