"""Captioned emoji in three styles, from openly licensed npm packages, as folders of PNG and caption files.

    npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    pip install emoji==2.16.0
    python scripts/emoji_data.py --packages . --out build/emoji

Writes OUT/SPLIT/NNNNN.png (64x64, on white), NNNNN.txt (the caption) and OUT/SPLIT.jsonl (caption, other captions,
concept, style, category), which ``data.images: build/emoji/train`` in a recipe takes as they are. The splits:

    train      what the teacher sees
    styles     a concept that train has in the other two styles: known words, a picture never seen
    concepts   a concept, with all of its genders, that train has in no style

Variants of skin tone are left out: one package has two tones swapped, and they would outnumber everything else. Which
concepts are held out depends on the hash of their name alone. The pictures are Twemoji (CC BY 4.0), Noto Emoji
(Apache-2.0) and Microsoft's Fluent Emoji (MIT); whoever passes on what is made of them names them.
"""

import argparse
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

# Style: the package's archive, the folder of pictures in it.
PACKAGES = {
    "flat": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/"),
    "shaded": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/"),
    "3d": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/"),
}
SIZE = 64
# Percent of concepts held out in every style, and in one style.
UNSEEN, ONE_STYLE = 5, 10
PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "male", "female", "child", "adult"}


def pictures(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """(code points as in "1f430-200d", file content) of every picture; nothing is unpacked to disk."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and member.name.startswith(folder) and path.suffix in (".png", ".webp"):
                yield plain(path.stem), tar.extractfile(member).read()


def plain(code: str) -> str:
    """A file's code points without variation selectors, which packages write or leave out as they like."""
    return "-".join(part for part in code.lower().replace("_", "-").split("-") if part != "fe0f")


def catalogue(archive: Path) -> dict[str, dict]:
    """By code: CLDR name, other names and category of every emoji without its skin tones."""
    import emoji  # pip install emoji

    known = {key.replace("\ufe0f", ""): value["en"] for key, value in emoji.EMOJI_DATA.items()}
    with tarfile.open(archive) as tar:
        entries = json.load(tar.extractfile("package/emoji.json"))
    found = {}
    for entry in entries:
        code = plain(entry["unified"])
        name = words(known["".join(chr(int(part, 16)) for part in code.split("-"))])
        others = [words(short) for short in entry["short_names"]]
        if entry["subcategory"] == "country-flag":
            name, others = f"flag of {name}", []
        others = sorted({other for other in others if other and other != name})
        found[code] = {"name": name, "others": others, "category": entry["category"]}
    return found


def words(name: str) -> str:
    """ ":man_judge:" and "male-judge" as lower-case words."""
    return " ".join(name.strip(":").replace("_", " ").replace("-", " ").lower().split())


def share(text: str) -> float:
    """A number in [0, 100) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32 * 100


def split(name: str, style: str) -> str:
    """The split of a concept in a style; its genders stay together."""
    concept = " ".join(word for word in name.split() if word not in PEOPLE) or name
    if share(concept) < UNSEEN:
        return "concepts"
    one = list(PACKAGES)[int(share(f"{concept}: which style") / 100 * len(PACKAGES))]
    return "styles" if share(f"{concept}: in one style") < ONE_STYLE and style == one else "train"


def on_white(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture)
    return paper.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def caption(style: str, name: str) -> str:
    return f"{style} emoji of {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("."), help="folder of the three .tgz files")
    parser.add_argument("--out", type=Path, default=Path("build/emoji"))
    arguments = parser.parse_args()
    known = catalogue(arguments.packages / PACKAGES["flat"][0])
    lines: dict[str, list[str]] = {"train": [], "styles": [], "concepts": []}
    for style, (archive, folder) in PACKAGES.items():
        for code, content in sorted(pictures(arguments.packages / archive, folder)):
            if code not in known:
                continue
            entry = known[code]
            where = split(entry["name"], style)
            file = arguments.out / where / f"{len(lines[where]):05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            on_white(content).save(file)
            text = caption(style, entry["name"])
            file.with_suffix(".txt").write_text(text, encoding="utf-8")
            others = [caption(style, other) for other in entry["others"]]
            facts = {"image": f"{where}/{file.name}", "caption": text, "others": others, "concept": entry["name"]}
            lines[where].append(json.dumps(facts | {"style": style, "category": entry["category"]}))
    for name, found in lines.items():
        (arguments.out / f"{name}.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")
        print(f"{name}: {len(found)} pictures")


if __name__ == "__main__":
    main()
