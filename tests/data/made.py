"""The same three samples as every form of a source."""

import io
import json
import tarfile

import pytest
from PIL import Image

CAPTIONS = ["a red square", "ein grünes Quadrat", "a blue square, again"]
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def png(colour, size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def shard(path, members) -> str:
    """A .tar of (name, content) pairs; content may be a TarInfo to be added as it is."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(content)
            archive.addfile(info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content))
    return str(path)


def folder(place) -> str:
    for i, (caption, colour) in enumerate(zip(CAPTIONS, COLOURS, strict=True)):
        (place / f"{i}.png").write_bytes(png(colour))
        (place / f"{i}.txt").write_text(f"{caption}\n", encoding="utf-8")
    return str(place)


def jsonl(place) -> str:
    folder(place / "pictures")
    lines = [json.dumps({"file_name": f"pictures/{i}.png", "text": text}) for i, text in enumerate(CAPTIONS)]
    (place / "metadata.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    return str(place)


def shards(place) -> str:
    rows = list(enumerate(zip(CAPTIONS, COLOURS, strict=True)))
    shard(place / "0.tar", [("./", directory()), *member("./0", *rows[0][1]), *member("in/a.1", *rows[1][1])])
    shard(place / "1.tar", [("2.json", json.dumps({"caption": CAPTIONS[2]}).encode()), ("2.png", png(COLOURS[2]))])
    return str(place)


def directory() -> tarfile.TarInfo:
    info = tarfile.TarInfo("./")
    info.type = tarfile.DIRTYPE
    return info


def member(name, caption, colour):
    stem = name.replace(".1", "")
    return [(f"{stem}.png", png(colour)), (f"{stem}.txt", caption.encode())]


def rows() -> dict:
    return {"image": [{"bytes": png(colour), "path": None} for colour in COLOURS], "caption": CAPTIONS}


def table(place, form: str) -> str:
    """A dataset as each kind of file that the library writes."""
    datasets = pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    whole = datasets.table.InMemoryTable(arrow.table(rows(), schema=features.arrow_schema))
    # Given a fingerprint: making one pickles what some versions of pyarrow cannot.
    made = datasets.Dataset(whole, fingerprint="rows")
    if form == "saved":
        datasets.DatasetDict({"train": made}).save_to_disk(str(place / "saved"))
        return str(place / "saved")
    if form == "parquet":
        parquet.write_table(made.data.table, place / "rows.parquet")
        return str(place / "rows.parquet")
    made.save_to_disk(str(place / "whole"))
    return str(next((place / "whole").glob("*.arrow")))
