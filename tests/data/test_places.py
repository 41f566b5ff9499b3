"""Sources at URLs, by patterns, in nested folders and as tables give what the same files beside each other give."""

import tarfile
from pathlib import Path

import fsspec
import pytest

from data.loaded import loaded
from data.made import CAPTIONS, COLOURS, folder, png, shard
from stepdistill.data import images, places
from stepdistill.data.lines import Lines
from stepdistill.data.sources import count, form
from stepdistill.errors import InputError
from stepdistill.recipe import Data, load


@pytest.fixture
def memory(monkeypatch):
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


def table(place: Path, ending: str) -> str:
    folder(place)
    mark = {"csv": ",", "tsv": "\t"}[ending]
    rows = [mark.join(("file_name", "text")), *(f'{i}.png{mark}"{text}"' for i, text in enumerate(CAPTIONS))]
    (place / f"rows.{ending}").write_text("\ufeff" + "\r\n".join(rows) + "\r\n", encoding="utf-8")
    return str(place / f"rows.{ending}")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_names_captions_and_pictures(ending, tmp_path):
    file = table(tmp_path, ending)
    pixels, captions, _ = loaded(Data(images=file), 3, 4)
    assert captions == CAPTIONS and pixels[:, :, 0, 0].tolist() == [list(colour) for colour in COLOURS]
    assert images.captions(Data(images=file, caption_key="file_name")) == ["0.png", "1.png", "2.png"]
    assert images.requests(Data(images=file, arguments={"image": "file_name"}))[0] == CAPTIONS
    assert count(file, None) == 3


def test_metadata_csv_speaks_for_its_folder(tmp_path):
    Path(table(tmp_path, "csv")).rename(tmp_path / "metadata.csv")
    assert loaded(Data(images=str(tmp_path)), 3, 4)[1] == CAPTIONS


def test_rows_of_another_length_are_counted_and_other_text_is_refused(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    file.write_text("text,file_name\na,0.png\nb\nc,1.png,more\n")
    assert images.captions(Data(images=str(file), max_rejected=0.9)) == ["a"]
    assert "2 of 3 samples rejected (2 another number of columns" in capsys.readouterr().err
    file.write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"rows\.csv:.*cannot be read as a table in UTF-8"):
        images.captions(Data(images=str(file)))


@pytest.mark.parametrize("source", ["folder", "jsonl", "shards", "parquet", "arrow", "saved"], indirect=True)
def test_every_source_can_be_at_a_url(source, memory):
    memory.put(source, "/bucket/" + Path(source).name, recursive=True)
    url = "memory://bucket/" + Path(source).name
    pixels, captions, _ = loaded(Data(images=url), 3, 4)
    assert captions == CAPTIONS and pixels[:, :, 0, 0].tolist() == [list(colour) for colour in COLOURS]
    assert (form(url), count(url, None), count(url, 2)) == (form(source), 3, 2)


def test_a_table_at_a_url(memory, tmp_path):
    memory.put(str(Path(table(tmp_path / "", "csv")).parent), "/bucket/rows", recursive=True)
    assert loaded(Data(images="memory://bucket/rows/rows.csv"), 3, 4)[1] == CAPTIONS


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.txt", ["rain", "snow"]), ("*.txt", ["rain", "snow", "a red shoe"]), ("b.txt", ["a red shoe"])],
)
@pytest.mark.parametrize("remote", [False, True])
def test_prompts_may_be_at_a_url_or_in_several_files(name, expected, remote, memory, tmp_path, monkeypatch):
    """They are read once, into the cache."""
    for file, content in {"a.txt": b"\xef\xbb\xbfrain\r\n\n  snow  \n", "b.txt": b"a red shoe"}.items():
        memory.pipe(f"/bucket/{file}", content)
        (tmp_path / file).write_bytes(content)
    data = load("quickstart", [f"data.conditions={'memory://bucket' if remote else tmp_path}/{name}"]).data
    found, listed = images.conditions(data, cache=tmp_path / "cache"), images.conditions(data)
    assert list(Lines(Path(found[0]))) == expected and listed in (found, (expected, None))
    monkeypatch.setattr(images, "lines_of", None)
    assert images.conditions(data, cache=tmp_path / "cache") == found


def test_prompts_that_are_no_text_are_named(memory):
    memory.pipe("/bucket/a.txt", b"\xff\xfe")
    with pytest.raises(InputError, match=r"memory://bucket/a\.txt: expected UTF-8 text, found byte 0xff"):
        images.conditions(Data(conditions="memory://bucket/a.txt"))
    with pytest.raises(InputError, match=r"memory://bucket/none\.txt: cannot be read"):
        images.conditions(Data(conditions="memory://bucket/none.txt"))


def test_pictures_may_be_at_urls_themselves(memory, tmp_path, monkeypatch, capsys):
    memory.pipe("/there/0.png", png(COLOURS[0]))
    file = tmp_path / "rows.jsonl"
    lines = [f'{{"text": "a", "image": "{place}"}}\n' for place in ("memory://there/0.png", "s3://no/0.png")]
    file.write_text("".join(lines))
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    pixels, captions, _ = loaded(Data(images=str(file), max_rejected=0.5), 3, 4)
    assert captions == ["a"] and pixels[0, :, 0, 0].tolist() == list(COLOURS[0])
    assert "1 of 2 samples rejected (1 unreadable image)" in capsys.readouterr().err


def test_a_url_without_its_package_is_one_line_with_the_key(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(InputError, match=r"data\.images: s3://bucket/some: cannot be opened: Install s3fs"):
        load("quickstart", ["data.images=s3://bucket/some"])
    with pytest.raises(InputError, match=r"s3://bucket/a\.jsonl: cannot be opened: .*Install s3fs"):
        images.captions(Data(images="s3://bucket/a.jsonl"))


@pytest.mark.parametrize("name", ["{000..002}.tar", "*.tar", "{000,001,002}.tar"])
@pytest.mark.parametrize("remote", [False, True])
def test_shards_are_named_by_a_pattern(name, remote, tmp_path, memory):
    for i, caption in enumerate(CAPTIONS):
        shard(tmp_path / f"{i:03}.tar", [("0.png", png(COLOURS[i])), ("0.txt", caption.encode())])
    (tmp_path / "notes.txt").write_text("")
    if remote:
        memory.put(str(tmp_path), "/bucket/shards", recursive=True)
    source = f"memory://bucket/shards/{name}" if remote else f"{tmp_path}/{name}"
    assert form(source) == "shards" and loaded(Data(images=source), 3, 4)[1] == CAPTIONS
    assert form(f"{tmp_path}/*.none") is None


def test_a_pattern_of_several_kinds_is_refused(tmp_path):
    for name in ("a.tar", "b.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"data\.images: .*expected files of one kind"):
        load("quickstart", [f"data.images={tmp_path}/*"])


def test_compressed_shards_are_read(tmp_path):
    for name in ("a.tar.gz", "b.tgz"):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            (tmp_path / "0.txt").write_text(name)
            archive.add(tmp_path / "0.txt", "0.txt")
            (tmp_path / "0.txt").unlink()
    assert images.captions(Data(conditions=str(tmp_path)), "conditions") == ["a.tar.gz", "b.tgz"]


@pytest.mark.parametrize("source", ["parquet"], indirect=True)
def test_a_clone_of_a_dataset_gives_its_split_for_training(source, tmp_path, capsys):
    place = tmp_path / "clone"
    (place / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (place / "data" / f"{name}.parquet").write_bytes(Path(source).read_bytes())
    (place / "README.md").write_text("# a dataset")
    assert form(str(place)) == "dataset" and count(str(place), None) == 6
    capsys.readouterr()
    assert len(loaded(Data(images=str(place)), 3, 4)[1]) == 6
    assert "2 files of the split train are read, 1 others are not" in capsys.readouterr().err
    one = f"{place}/data/test-*.parquet"
    assert loaded(Data(images=one), 3, 4)[1] == CAPTIONS


def test_shards_in_subfolders_are_found(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        shard(tmp_path / split / "0.tar", [("0.txt", split.encode())])
    assert images.captions(Data(conditions=str(tmp_path)), "conditions") == ["train"]


def test_a_column_of_bytes_is_a_picture(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    rows = {"jpg": [png(colour) for colour in COLOURS], "caption": CAPTIONS}
    parquet.write_table(arrow.table(rows), tmp_path / "rows.parquet")
    pixels, captions, _ = loaded(Data(images=str(tmp_path / "rows.parquet")), 3, 4)
    assert captions == CAPTIONS and pixels[:, :, 0, 0].tolist() == [list(colour) for colour in COLOURS]


def test_counting_reads_no_picture_and_no_caption(tmp_path, monkeypatch):
    folder(tmp_path)
    monkeypatch.setattr("stepdistill.data.folders.opened", lambda place: pytest.fail(f"{place} was read"))
    assert count(str(tmp_path), None) == 3


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a/B.TAR", ".tar"), ("https://x/y.parquet?download=true", ".parquet"), ("s3://a.b/c", ""), ("a.tgz", ".tar.gz")],
)
def test_endings(name, ending):
    assert places.ending(name) == ending
