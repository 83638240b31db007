"""A dataset is what people have: files of any kind, and nothing of it gets lost."""

import bz2
import csv
import glob
import gzip
import json
import lzma
import os
import shutil
import zipfile
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
from tp2d_lib.data import files, tables

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


def write_json_rows(path: Path) -> Path:
    """One object, with a list of objects under one key."""
    content = {"version": "1", "data": [{"text": t} for t in TEXTS]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1))
    return path.with_suffix(".json")


def write_json_lines(path: Path) -> Path:
    """Lines, whatever the file's name says."""
    path.with_suffix(".json").write_bytes(b"\n" + lines(TEXTS))
    return path.with_suffix(".json")


def write_csv(path: Path, delimiter=",", suffix=".csv", **options) -> Path:
    encoding = options.pop("encoding", "utf-8")
    with open(path.with_suffix(suffix), "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter, **options)
        writer.writerows([("id", "text"), *enumerate(TEXTS)])
    return path.with_suffix(suffix)


def write_tsv(path: Path) -> Path:
    return write_csv(path, "\t", ".tsv")


def write_excel(path: Path) -> Path:
    """As spreadsheets write it in much of Europe: a mark, semicolons, quotes."""
    return write_csv(path, ";", encoding="utf-8-sig", quoting=csv.QUOTE_ALL)


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path.with_suffix(".jsonl.zip"), "w") as archive:
        archive.writestr("inner.jsonl", lines(TEXTS))
    return path.with_suffix(".jsonl.zip")


def write_xz(path: Path) -> Path:
    path.with_suffix(".jsonl.xz").write_bytes(lzma.compress(lines(TEXTS)))
    return path.with_suffix(".jsonl.xz")


def write_zst(path: Path) -> Path:
    """In two frames, as tools that work in parallel write it."""
    path = path.with_suffix(".jsonl.zst")
    codec = pa.Codec("zstd")
    halves = (lines(TEXTS[:2]), lines(TEXTS[2:]))
    path.write_bytes(b"".join(codec.compress(half, asbytes=True) for half in halves))
    return path


def write_arrow_types(path: Path) -> Path:
    """Text in every type that Arrow has for it, one after another."""
    path.mkdir()
    kinds = [pa.string_view(), pa.large_string(), pa.binary()]
    kinds += [pa.dictionary(pa.int32(), pa.string())]
    for number, kind in enumerate(kinds):
        texts = TEXTS[number : number + 1] if number < 3 else TEXTS[3:]
        plain = pa.array(texts)
        array = plain.dictionary_encode() if number == 3 else plain.cast(kind)
        table = pa.table({"text": array, "id": pa.nulls(len(texts))})
        with pa.ipc.new_file(path / f"{number}.arrow", table.schema) as file:
            file.write_table(table)
    return path


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
KINDS += [write_saved_dict, write_json_rows, write_json_lines, write_excel, write_zip]
KINDS += [write_xz, write_zst, write_arrow_types]


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


def test_a_cell_is_text(texts_of, tmp_path):
    """So are NA, numbers with their digits, and dates; others may be empty."""
    texts = ["NA", "42", "null", "007", "1.10", "2024-01-01", "true", "1e5"]
    rows = "".join(f"{text},{n or ''}\n" for n, text in enumerate(texts))
    (tmp_path / "a.csv").write_text(f"text,id\n{rows}")
    assert texts_of(tmp_path / "a.csv") == texts


def test_quotes_that_quote_nothing(texts_of, tmp_path):
    """A table with tabs may have quotes in its texts, and no rule for them."""
    texts = ['"Yes", he said', 'a 5" disk', "it's"]
    rows = "".join(f"{n}\t{text}\n" for n, text in enumerate(texts))
    (tmp_path / "a.tsv").write_text(f"id\ttext\n{rows}")
    assert texts_of(tmp_path / "a.tsv") == texts
    (tmp_path / "b.csv").write_text('text\n"one, two"\nthree\n')
    assert texts_of(tmp_path / "b.csv") == ["one, two", "three"]


def test_a_table_longer_than_what_is_looked_at_first(texts_of, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SAMPLE", 40)
    assert texts_of(write_csv(tmp_path / "a")) == TEXTS
    assert texts_of(write_excel(tmp_path / "b")) == TEXTS


def test_a_path_that_exists_is_a_path(texts_of, tmp_path):
    """Brackets, stars and commas are signs of a pattern, and of a name."""
    folder = tmp_path / "[a] b,c*"
    folder.mkdir()
    for name, text in (("chat[1]", "one"), ("chat1", "two"), ("#3%20", "three")):
        (folder / f"{name}.jsonl").write_bytes(lines([text]))
    assert texts_of(folder / "chat[1].jsonl") == ["one"]
    assert texts_of(folder) == ["three", "two", "one"]
    assert texts_of(f"{glob.escape(str(folder))}/chat[0-9].jsonl") == ["two"]


def test_files_may_differ_in_what_is_not_trained_on(texts_of, make, tmp_path):
    """Numbers here, words there, a date, nothing at all."""
    folder = tmp_path / "given"
    folder.mkdir()
    for name, more in (
        ("a", {"id": 1, "when": "2024-01-01T00:00:00", "tags": ["x"]}),
        ("b", {"id": "x", "when": "", "tags": {"y": None}}),
        ("c", {}),
        ("d", {"id": 2**70, "when": 1e300}),
    ):
        content = json.dumps({"text": f"{name} text"} | more)
        (folder / f"{name}.jsonl").write_text(content)
    table = pa.table({"text": ["e text"], "id": [b"\xff\xfe"]})
    parquet.write_table(table, folder / "e.parquet")
    assert texts_of(folder) == [f"{name} text" for name in "abcde"]
    said = data.describe(data.prepare(make(dataset_name=str(folder), pack="none")))
    assert said.endswith("columns not used: id, tags, when")


def test_rows_are_named_by_content(make, tmp_path):
    """Neither time nor place is part of it, and equal sizes are not equal files."""
    one = write_jsonl(tmp_path / "a")
    config = make(dataset_name=str(one))
    rows = data.prepare(config)
    os.utime(one, (1, 1))
    other = shutil.copy(one, tmp_path / "other.jsonl")
    for path in (one, other):
        assert data.prepare(replace(config, dataset_name=str(path))) == rows
    one.write_bytes(one.read_bytes().replace(b"Text 0", b"Test 0"))
    os.utime(one, (1, 1))
    assert data.prepare(config) != rows


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("my-data_validation.csv", "validation"),
        ("dev/part-1.json", "validation"),
        ("eval/train.jsonl", "train"),
        ("data/extra-00001-of-00002.parquet", "extra"),
        ("contest/latest.jsonl", None),
        ("valid2.txt", "validation"),
    ],
)
def test_the_split_is_in_the_name(name, split):
    assert files.split_of(name) == split


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
        ("a.jsonl", lines(TEXTS) + b"[1]\n", "line 7 of {} holds list instead of an"),
        (
            "a.json",
            b'[{"text": "a"}, {"text": 5}]',
            "record 2 of {} holds int in 'text'",
        ),
        ("a.json", b'[{"text": "a"}, 5]', "record 2 of {} holds int instead of an obj"),
        ("a.jsonl", lines(TEXTS) + b'{"text": "\\ud83d"}', "line 7 of {} (half a char"),
        ("a.jsonl", b'{"text": "a", "x": NaN}', "line 1 of {} is not JSON (NaN is no"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 10**5, "line 1 of {} is not JSON"),
        ("a.csv", b"text,id\na,1\nb,2,3\n", "line 3 of {} has 3 cells, but its head"),
        ("a.csv", b'text,id\n"a\nb,1\n', "line 3 of {} is not CSV"),
        ("a.parquet", b"PAR1 and no more", "{} cannot be read ("),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-9], "{} cannot be read ("),
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


def test_a_dataset_on_the_hub_is_read_as_documents(monkeypatch, make):
    """Of text files on the Hub ``datasets`` would make a document of each line."""
    import datasets

    asked = []

    class Builder:
        name, info = "text", datasets.DatasetInfo()

        def __init__(self, *names, **options):
            self.info.splits = ["train"]
            asked.append((*names, options))

        def download_and_prepare(self):
            pass

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    config = make(dataset_config="small", dataset_revision="main")
    (table,) = files.of_hub("org/texts", config)["train"]
    given = {"name": "small", "revision": "main"}
    wholly = {"sample_by": "document", "encoding": "utf-8-sig"}
    assert asked[-1] == ("org/texts", given | wholly)
    assert table.place(7) == "row 7 of org/texts"


def test_files_that_change_make_other_rows(make, tmp_path):
    write_txt(tmp_path / "texts")
    config = make(dataset_name=str(tmp_path / "texts"))
    first = data.prepare(config)
    shutil.copy(tmp_path / "texts/0.txt", tmp_path / "texts/7.txt")
    second = data.prepare(config)
    assert first != second
    rows = [np.load(each / "input_ids.npy").size for each in (first, second)]
    assert rows[1] > rows[0]
