"""Write assets/pictures/report.png: the first screen of the example report in a headless Chromium.

    pip install playwright && playwright install chromium
    python scripts/report_picture.py

``--chromium`` names an installed browser in place of playwright's.
"""

import argparse
import io
from pathlib import Path

from check_pages import chromium
from PIL import Image

ASSETS = Path(__file__).parents[1] / "assets"
VIEW = {"width": 1240, "height": 933}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", help="an installed browser")
    with chromium(parser.parse_args().chromium) as browser:
        page = browser.new_page(viewport=VIEW)
        page.goto((ASSETS / "reports" / "fashion" / "index.html").as_uri())
        page.locator(".slider").wait_for()
        shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shown.quantize(256).save(ASSETS / "pictures" / "report.png", optimize=True)


if __name__ == "__main__":
    main()
