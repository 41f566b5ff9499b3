"""Type prompts into the demo page as a stranger would, in a headless Chromium, and keep what the browser shows.

    pip install playwright '.[demo]'
    python scripts/demo_walk.py --chromium /usr/bin/chromium

Writes docs/pictures/demo/*.png, one a prompt, after every picture of the prompt is there, and prints what the page
said. The last prompt has a word that the teacher does not know. Without ``--chromium`` playwright's own is used.
"""

import argparse
import io
import re
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from stepdistill import assets
from stepdistill.demo.content import load_demo
from stepdistill.demo.page import launch, page

PROMPTS = (
    "3d emoji of red heart",
    "shaded emoji of bicycle",
    "flag of italy",
    "flat emoji of rabbit face",
    "3d emoji of velociraptor",
)
VIEW = {"width": 1240, "height": 840}
PATIENCE = 300_000
"""Milliseconds for the pictures of one prompt."""


def type_prompt(browser: Page, prompt: str, samplers: int, picture: Path) -> str:
    """What the page says below the pictures and beside the prompt, once all of them are drawn."""
    browser.get_by_label("Prompt", exact=True).fill(prompt)
    browser.get_by_role("button", name="Draw", exact=True).click()
    browser.locator(".title", has_text=prompt).wait_for(timeout=PATIENCE)
    browser.wait_for_function(
        f"document.querySelectorAll('.shelf:not(.busy) img').length == {samplers}", timeout=PATIENCE
    )
    shown = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    shown.quantize(256).save(picture, optimize=True)
    hint = browser.locator(".hint")
    texts = [hint.inner_text()] if hint.count() else []
    return "\n".join([*texts, *browser.locator(".shelf figcaption").all_inner_texts()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--student", type=Path, default=None, help="default: the shipped one")
    parser.add_argument("--chromium", help="an installed browser")
    parser.add_argument("--out", type=Path, default=assets.root() / "docs" / "pictures" / "demo")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    demo = load_demo(arguments.student or assets.find("students/emoji"))
    blocks = page(demo)
    url = launch(blocks, None)
    try:
        with sync_playwright() as play, play.chromium.launch(executable_path=arguments.chromium) as chromium:
            browser = chromium.new_page(viewport=VIEW)
            browser.goto(url)
            for prompt in arguments.prompts:
                name = re.sub(r"\W+", "-", prompt.lower())
                shown = type_prompt(browser, prompt, len(demo.samplers), arguments.out / f"{name}.png")
                print(f"{prompt}\n{shown}\n", flush=True)
    finally:
        blocks.close()


if __name__ == "__main__":
    main()
