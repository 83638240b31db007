"""A dataset is what people have: files of any kind, and nothing of it gets lost."""

import bz2
import csv
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from transformers import AutoTokenizer

from tests.data.test_rows import refuse
from tp2d_lib import data
from tp2d_lib.data import sources

TEXTS = [f'Text {n}, "quoted",\nhas two lines\tand 1 tab: ünï.' for n in range(6)]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts)


def write_jsonl(path: Path) -> Path:
    path.with_suffix(".jsonl").write_bytes(lines(TEXTS))
    return path.with_suffix(".jsonl")


def write_json(path: Path) -> Path:
    path.with_suffix(".json").write_text(json.dumps([{"text": t} for t in TEXTS]))
    return path.with_suffix(".json")


def write_mark(path: Path) -> Path:
    """As some editors write it: with a byte order mark and other line ends."""
    content = lines(TEXTS).replace(b"}\n", b"}\r\n")
    path.with_suffix(".jsonl").write_bytes(b"\xef\xbb\xbf" + content)
    return path.with_suffix(".jsonl")


def write_csv(path: Path, delimiter=",", suffix=".csv") -> Path:
    with open(path.with_suffix(suffix), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("id", "text"), *enumerate(TEXTS)])
    return path.with_suffix(suffix)


def write_tsv(path: Path) -> Path:
    return write_csv(path, "\t", ".tsv")


def write_parquet(path: Path) -> Path:
    parquet.write_table(pa.table({"text": TEXTS}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_arrow(path: Path) -> Path:
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_stream(path.with_suffix(".arrow"), table.schema) as stream:
        stream.write_table(table)
    return path.with_suffix(".arrow")


def write_gzip(path: Path) -> Path:
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    return path.with_suffix(".jsonl.gz")


def write_txt(path: Path) -> Path:
    """A folder of text files: each is a document, with its newlines."""
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text, encoding="utf-8")
    return path


def write_markdown(path: Path) -> Path:
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.md.bz2").write_bytes(bz2.compress(text.encode()))
    return path


def write_glob(path: Path) -> Path:
    write_txt(path)
    (path / "7.log").write_text("no data")
    return path / "*.txt"


def write_saved(path: Path) -> Path:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(path, num_shards=2)
    return path


def write_saved_dict(path: Path) -> Path:
    table = Dataset.from_dict({"text": TEXTS})
    DatasetDict(train=table, test=table.select([0])).save_to_disk(path)
    return path


KINDS = [write_jsonl, write_json, write_mark, write_csv, write_tsv, write_parquet]
KINDS += [write_arrow, write_gzip, write_txt, write_markdown, write_glob, write_saved]
KINDS += [write_saved_dict]


@pytest.fixture
def texts_of(make):
    """The documents of a dataset, as they come back from its rows."""

    def read(name: object, **settings) -> list[str]:
        config = make(dataset_name=str(name), pack="none", seq_length=128, **settings)
        tokenizer = AutoTokenizer.from_pretrained(config.model_name)
        rows = data.open_rows(data.prepare(config))
        ids = [r[: n - 1] for r, n in zip(rows.input_ids, rows.lengths, strict=True)]
        return tokenizer.batch_decode(ids)

    return read


@pytest.mark.parametrize("write", KINDS, ids=lambda kind: kind.__name__[6:])
def test_every_kind_of_file(texts_of, tmp_path, write):
    assert texts_of(write(tmp_path / "given")) == TEXTS


def test_tokens_are_those_of_the_texts(make, tmp_path):
    """Six documents end six times, however they are stored."""
    counts = set()
    for write in (write_jsonl, write_csv, write_txt):
        config = make(dataset_name=str(write(tmp_path / write.__name__)))
        counts.add(data.describe(data.prepare(config)).split(";")[0])
    (line,) = counts
    assert line.startswith("6 documents, ")


def test_relative_paths_and_lists(texts_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a"))
    write_csv(Path("b"))
    write_txt(Path("c"))
    Path("d,e.jsonl").write_bytes(lines(TEXTS[:1]))
    assert texts_of("a.jsonl") == TEXTS
    assert texts_of("a.jsonl, b.csv,c/*.txt") == TEXTS * 3
    assert texts_of("d,e.jsonl") == TEXTS[:1]
    assert texts_of("c") == texts_of("./c") == texts_of("c/[0-9].txt") == TEXTS
    assert texts_of("a.jsonl,b.csv", dataset_percentage=75) == [*TEXTS, *TEXTS[:3]]


def test_a_folder_of_several_formats_is_read_whole(texts_of, make, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for write in (write_jsonl, write_csv, write_parquet):
        write(folder / write.__name__)
    (folder / "last.txt").write_text(TEXTS[0])
    assert sorted(texts_of(folder)) == sorted(TEXTS * 3 + TEXTS[:1])
    (folder / "README.md").write_text("# No data")
    (folder / "plot.png").write_bytes(b"\x89PNG")
    (folder / "empty.jsonl").touch()
    config = make(dataset_name=str(folder))
    said = data.describe(data.prepare(config))
    assert said.startswith("19 documents, ")
    assert said.endswith("files not read: empty.jsonl, plot.png")
    assert data.describe(data.prepare(config)) == said  # of rows that exist, too


def test_files_of_no_split_are_named(make, tmp_path):
    """Beside a file called train, ``datasets`` takes others for something else."""
    write_jsonl(tmp_path / "train")
    write_jsonl(tmp_path / "more")
    said = data.describe(data.prepare(make(dataset_name=str(tmp_path))))
    assert said.startswith("6 documents, ")
    assert said.endswith("files not read: more.jsonl")


def test_columns_may_hold_anything_else(texts_of, tmp_path):
    """NA is a text; a number in a CSV is one, too, where others are."""
    (tmp_path / "a.csv").write_text("text,id\nNA,1\n42,2\nnull,3\nlast,x\n")
    assert texts_of(tmp_path / "a.csv") == ["NA", "42", "null", "last"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", lines(TEXTS) + b'{"text": "b\xff"}\n', "line 7 of {} has the byte"),
        (
            "a.jsonl",
            lines(TEXTS) + b'{"text": 5}\n',
            "line 7 of {} holds int in 'text'",
        ),
        ("a.jsonl", lines(TEXTS) + b'{"text": \n', "line 7 of {} is not JSON"),
        ("a.jsonl", lines(TEXTS) + b"[1]\n", "line 7 of {} holds int instead of an o"),
        ("a.json", b'[{"text": "a"}, {"text": 5}]', "{} holds int in 'text' instead"),
        ("a.txt", b"one\ntwo \xff\n", "line 2 of {} has the byte 0xff, which is not"),
        ("a.csv", b"text\none\n\xfe\n", "line 3 of {} has the byte 0xfe, which is not"),
        ("a.jsonl", b"", "none holds data: a.jsonl"),
        ("a.log", b"one", "none holds data: a.log"),
    ],
)
def test_damage_is_named_by_file_and_line(make, tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    assert sentence.format(path) in refuse(make(dataset_name=str(path)))


def test_a_file_that_is_not_there(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gone.jsonl", str(tmp_path / "gone"), "gone/*.txt"):
        assert f"dataset_name={name!r} must be" in refuse(
            replace(make(), dataset_name=name)
        ).replace(str(tmp_path / "gone/*.txt"), "gone/*.txt")


@pytest.mark.faults
def test_a_long_line(texts_of, tmp_path):
    """20 MB: more than the readers take at once."""
    long = "word " * 4_000_000
    (tmp_path / "a.jsonl").write_bytes(lines(["short", long, "last"]))
    first, cut, last = texts_of(tmp_path / "a.jsonl")
    assert (first, last) == ("short", "last")
    assert long.startswith(cut)


def test_a_dataset_on_the_hub_is_read_as_documents(monkeypatch, tmp_path):
    """Of text files on the Hub ``datasets`` would make a document of each line."""
    import datasets

    asked = []

    def builder(name, config_name=None, **options):
        asked.append((name, config_name, options))
        return type("Builder", (), {"name": "text"})

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    config = type("Config", (), {"dataset_config": "small"})
    sources.of_hub("org/texts", config)
    assert asked[-1] == ("org/texts", "small", sources.TEXT[1])


def test_files_that_change_make_other_rows(make, tmp_path):
    write_txt(tmp_path / "texts")
    config = make(dataset_name=str(tmp_path / "texts"))
    first = data.prepare(config)
    shutil.copy(tmp_path / "texts/0.txt", tmp_path / "texts/7.txt")
    second = data.prepare(config)
    assert first != second
    rows = [np.load(each / "input_ids.npy").size for each in (first, second)]
    assert rows[1] > rows[0]
