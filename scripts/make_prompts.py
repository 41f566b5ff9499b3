"""Writes assets/prompts/everyday.txt: a few hundred plain captions from a small grammar, the same at every run.

    python scripts/make_prompts.py

They serve methods that need prompts and no images, to start with; a run that matters wants prompts of its own subject.
"""

import random
from pathlib import Path

FILE = Path(__file__).parents[1] / "assets" / "prompts" / "everyday.txt"
COUNT = 400

KINDS = [
    "a photo of",
    "a close view of",
    "a watercolour of",
    "a pencil drawing of",
    "an oil painting of",
    "a film still of",
]
ADJECTIVES = [
    "small",
    "old",
    "wooden",
    "red",
    "blue",
    "striped",
    "sleeping",
    "tall",
    "shiny",
    "rusty",
    "round",
    "white",
]
THINGS = [
    "bicycle", "teapot", "lighthouse", "tabby cat", "sheepdog", "rowing boat", "street lamp", "apple tree", "violin",
    "stone bridge", "market stall", "bus", "rabbit", "armchair", "umbrella", "windmill", "loaf of bread", "clock tower",
    "kingfisher", "tractor", "bowl of soup", "pair of boots", "garden gate", "paper kite",
]  # fmt: skip
PLACES = [
    "by a lake", "on a kitchen table", "in a narrow street", "in tall grass", "at the edge of a forest", "on a beach",
    "in front of a brick wall", "under a bridge", "in an empty room", "on a mountain path", "beside a window",
]  # fmt: skip
LIGHTS = ["at dawn", "in the rain", "at night", "in soft light", "under a clear sky", "in fog", "in snow", "at noon"]


def caption(draw: random.Random) -> str:
    """One caption: a kind of picture, a thing, a place, a light."""
    adjective, place = draw.choice(ADJECTIVES), draw.choice(PLACES)
    article = "an" if adjective[0] in "aeiou" else "a"
    return f"{draw.choice(KINDS)} {article} {adjective} {draw.choice(THINGS)} {place} {draw.choice(LIGHTS)}"


def captions(count: int, seed: int = 0) -> list[str]:
    """``count`` different captions, the same for the same seed."""
    draw, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        found[caption(draw)] = None
    return list(found)


def main() -> None:
    """Write the file."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("".join(f"{line}\n" for line in captions(COUNT)), encoding="utf-8")


if __name__ == "__main__":
    main()
