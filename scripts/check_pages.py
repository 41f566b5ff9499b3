"""Open every page of the documentation and of given reports in a headless Chromium, and say what is wrong.

    make docs && pip install playwright && playwright install chromium
    python scripts/check_pages.py assets/reports/fashion/index.html --out build/pages

Each page is opened at 1280 and 390 pixels, at 1280 also in dark mode. Faults are: a page wider than its window, a
picture that does not load, an error in the console, a request to another host. With ``--out`` there is a picture of
every page to be looked at. ``--chromium`` names an installed browser in place of playwright's.

Exit codes: 0 without faults, 1 with some, 2 where there is no Chromium or no page.
"""

import argparse
import functools
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VIEWS = {"1280": (1280, "light"), "390": (390, "light"), "1280-dark": (1280, "dark")}
"""By name: pixels across, and the colour scheme that the browser asks for."""
HEIGHT = 844
MISSING = "no Chromium to open pages with: pip install playwright && playwright install chromium"

LOOK = """async () => {
  const images = [...document.images];
  images.forEach(image => image.loading = "eager");
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  const page = document.documentElement;
  const scrolls = e => e && e !== page && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
  const wide = page.scrollWidth > page.clientWidth ? [...document.body.querySelectorAll("*")].filter(
    e => e.getBoundingClientRect().right > page.clientWidth + 1 && !scrolls(e.parentElement)) : [];
  return {
    over: page.scrollWidth - page.clientWidth,
    wide: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 100)),
    broken: images.filter(image => !image.naturalWidth).map(image => image.src.slice(0, 100)),
  };
}"""


def faults(found: dict[str, Any], errors: list[str], asked: list[str], own: str) -> list[str]:
    """What is wrong with a page, a line each.

    Args:
        found: what ``LOOK`` returned.
        errors: messages of the console and of scripts.
        asked: addresses that the page requested.
        own: how addresses begin that it may request.
    """
    lines = []
    if found["over"] > 0:
        lines.append(f"{found['over']} pixels wider than the window: {' '.join(found['wide'])}")
    lines += [f"picture not there: {source}" for source in found["broken"]]
    lines += [f"error: {error}" for error in errors]
    others = {address for address in asked if not address.startswith((own, "file:", "data:", "blob:", "about:"))}
    return lines + [f"asks another host: {address}" for address in sorted(others)]


def look(browser: Any, address: str, own: str, width: int, scheme: str, picture: Path | None) -> list[str]:
    """The faults of one page in one view; ``picture`` is written unless it is None."""
    page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address, wait_until="load")
    page.wait_for_timeout(150)  # scripts of the theme draw menus after the page is loaded
    found = page.evaluate(LOOK)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(picture), full_page=True)
    page.close()
    return faults(found, errors, asked, own)


@contextmanager
def chromium(path: str | None) -> Iterator[Any]:
    """A headless browser of playwright; ends the program with code 2 and one line where there is none."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        print(MISSING, file=sys.stderr)
        sys.exit(2)
    with sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=path)
        except Error as error:
            print(f"{MISSING} ({str(error).splitlines()[0]})", file=sys.stderr)
            sys.exit(2)
        with browser:
            yield browser


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's address while it is served on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def check(browser: Any, site: Path, reports: list[Path], out: Path | None) -> int:
    """The number of faults, which are printed page by page."""
    count = 0
    with served(site) as own:
        pages = {place.relative_to(site).as_posix(): place for place in sorted(site.rglob("*.html"))}
        addresses = {name: own + name for name in pages} | {str(path): path.resolve().as_uri() for path in reports}
        for name, address in addresses.items():
            short = re.sub(r"\W+", "-", name.removesuffix("index.html")).strip("-") or "index"
            for view, (width, scheme) in VIEWS.items():
                for fault in look(browser, address, own, width, scheme, out and out / f"{short}-{view}.png"):
                    print(f"{name}, {view}: {fault}", flush=True)
                    count += 1
    print(f"{len(addresses)} pages, {count} faults", flush=True)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path, help="pages beside those of the site")
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--chromium", help="an installed browser")
    parser.add_argument("--out", type=Path, help="a folder for pictures of the pages")
    arguments = parser.parse_args()
    if absent := [path for path in (arguments.site / "index.html", *arguments.reports) if not path.is_file()]:
        print(f"check_pages: {absent[0]} does not exist; make docs writes the site", file=sys.stderr)
        return 2
    with chromium(arguments.chromium) as browser:
        return int(check(browser, arguments.site, arguments.reports, arguments.out) > 0)


if __name__ == "__main__":
    sys.exit(main())
