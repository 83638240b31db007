"""Rows are the documents and nothing else, made once."""

import itertools
import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.texts import SEQ, sentences, write_lines, write_texts
from tp2d_lib import data
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data.tokens import Tokens


def encode(config: TrainConfig, texts: list[str]) -> list[list[int]]:
    """The documents' tokens, end token last, without any code of the library."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return [[*tokenizer.encode(text), end] for text in texts]


def pack(documents: list[list[int]], seq_length: int) -> list[list[int]]:
    """The rows of the joined documents; the last one may be shorter."""
    joined = list(itertools.chain(*documents))
    starts = range(0, len(joined) - 1, seq_length)
    return [joined[start : start + seq_length] for start in starts]


def read(directory: Path) -> list[list[int]]:
    """The rows, without padding."""
    rows = data.open_rows(directory)
    found = zip(rows.input_ids, rows.lengths, strict=True)
    return [ids[:length].tolist() for ids, length in found]


def all_rows(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Every prepared row as one micro-batch."""
    loader = data.BatchLoader(config, data.prepare(config), dp_rank=0)
    return loader.micro_batch(np.arange(loader.size))


def refuse(config: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        data.prepare(config)
    assert not list(config.data_dir.glob(".rows-*"))  # nothing half-made stays
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_packed_rows_are_the_joined_documents(make):
    config = make(seq_length=100)
    lines = Path(config.dataset_name, "train.jsonl").read_text().splitlines()
    documents = encode(config, [json.loads(line)["text"] for line in lines])
    rows = read(data.prepare(config))
    assert rows == pack(documents, 100)
    assert sum(map(len, rows)) == sum(map(len, documents))


def test_of_packed_rows_the_last_is_padded(make, tmp_path):
    config = make(dataset_name=write_texts(tmp_path / "texts", sentences(9)))
    batch = all_rows(config)
    *_, last = read(data.prepare(config))
    assert torch.equal(batch["labels"][:-1], batch["input_ids"][:-1])
    assert batch["labels"][-1].tolist() == last + [data.IGNORED] * (SEQ - len(last))
    assert batch["labels"].dtype == torch.int64
    full = (len(batch["labels"]) - 1) * (SEQ - 1)
    assert data.valid_tokens([batch]) == full + len(last) - 1


@pytest.mark.parametrize("pack", ["stream", "none", "documents"])
def test_empty_documents_are_left_out(make, tmp_path, pack):
    texts = sentences(3)
    holes = ["", texts[0], "  \n", None, texts[1], "", texts[2], *[""] * 1500]
    full = write_texts(tmp_path / "full", texts)
    with_holes = write_texts(tmp_path / "holes", [*holes[7:], *holes])
    config = make(dataset_name=full, pack=pack)
    rows = read(data.prepare(config))
    assert rows
    assert read(data.prepare(replace(config, dataset_name=with_holes))) == rows


def test_padded_rows_are_one_document_each(make, tmp_path):
    texts = ["Short.", *sentences(3), "Very long. " * SEQ, "x"]
    config = make(dataset_name=write_texts(tmp_path / "texts", texts), pack="none")
    documents = [document[:SEQ] for document in encode(config, texts)]
    assert {len(document) < SEQ for document in documents} == {True, False}
    batch = all_rows(config)
    assert len(batch["labels"]) == len(texts)
    for ids, labels, document in zip(
        batch["input_ids"].tolist(), batch["labels"].tolist(), documents, strict=True
    ):
        padding = SEQ - len(document)
        assert ids[: len(document)] == document
        assert labels == document + [data.IGNORED] * padding
        assert all(0 <= token < 2048 for token in ids)  # padding can be embedded
    assert data.valid_tokens([batch]) == sum(len(each) - 1 for each in documents)


def test_padded_rows_predict_something(make, monkeypatch):
    documents = [[5], [5, 6], [7], [7, 8, 9]]
    ids = np.array(list(itertools.chain(*documents)), np.int32)
    tokens = Tokens(ids, None, np.array([len(each) for each in documents]), Counter())
    monkeypatch.setattr(data.writing, "tokenize", lambda *_: tokens)
    batch = all_rows(make(pack="none"))
    real = [[t for t in row if t != data.IGNORED] for row in batch["labels"].tolist()]
    assert real == [[5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("percentage", "count"), [(100, 200), (50, 100), (12.5, 25), (0.5, 1)]
)
def test_percentage_takes_the_first_documents(make, tmp_path, percentage, count):
    texts = sentences(200)
    config = make(
        dataset_name=write_texts(tmp_path / "texts", texts),
        dataset_percentage=percentage,
        seq_length=8,
    )
    assert read(data.prepare(config)) == pack(encode(config, texts[:count]), 8)


# ---------------------------------------------------------------- reuse


def test_second_prepare_reuses_rows(make, tmp_path, monkeypatch):
    config = make(dataset_name=write_texts(tmp_path / "texts", sentences(20)))
    directory = data.prepare(config)
    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert {path.name for path in times} == {*data.checks.FILES, data.checks.CHECKSUMS}

    again = lambda *_: pytest.fail("tokenized again")  # noqa: E731
    monkeypatch.setattr(data.writing, "tokenize", again)
    copy = shutil.copytree(config.model_name, tmp_path / "copy")
    for same in (
        {},
        {"learning_rate": 1.0, "seed": 1, "dp_size": 2, "tp_size": 2},
        {"model_name": str(copy)},  # an equal tokenizer in another place
    ):
        fields = {"num_workers": None, **same}
        assert data.prepare(replace(config, **fields)) == directory
    assert times == {path: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"seq_length": 8},
        {"pack": "none"},
        {"pack": "documents"},
        {"text_column": "title"},
        {"dataset_percentage": 50},
    ],
    ids=str,
)
def test_other_setting_makes_other_rows(make, tmp_path, change):
    documents = [{"text": text, "title": text[9:]} for text in sentences(20)]
    config = make(dataset_name=write_lines(tmp_path / "texts", documents))
    rows = read(data.prepare(config))
    assert read(data.prepare(replace(config, **change))) != rows
    assert read(data.prepare(config)) == rows  # and leaves the first alone


def test_other_content_makes_other_rows(make, tmp_path):
    config = make(dataset_name=write_texts(tmp_path / "texts", sentences(20)))
    first = data.prepare(config)
    texts = [text.upper() for text in sentences(20)]
    write_texts(tmp_path / "texts", texts)
    second = data.prepare(config)
    assert second != first
    assert read(second) == pack(encode(config, texts), SEQ)


@pytest.mark.parametrize("part", ["end token", "merges"])
def test_other_tokenizer_makes_other_rows(make, tmp_path, part):
    texts = write_texts(tmp_path / "texts", sentences(20))
    one = shutil.copytree(make().model_name, tmp_path / "one")
    change_json(one / "tokenizer_config.json", additional_special_tokens=["!"])
    two = shutil.copytree(one, tmp_path / "two")
    if part == "end token":  # a special token in both: only its role changes
        change_json(two / "tokenizer_config.json", eos_token="!")
    else:
        bpe = json.loads((two / "tokenizer.json").read_text())["model"]
        bpe["merges"] = bpe["merges"][:9]
        change_json(two / "tokenizer.json", model=bpe)
    configs = [make(dataset_name=texts, model_name=str(each)) for each in (one, two)]
    rows = [read(data.prepare(config)) for config in configs]
    assert rows[0] != rows[1]


def change_json(path: Path, **parts) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def prepare_together(config):
    """On every rank: the rows' directory, and how often this rank tokenized."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(config.model_name)  # slow imports, out of the way
    tokenize, calls = data.writing.tokenize, []

    def slow(*args):
        calls.append(args)
        time.sleep(0.5)  # so that the others arrive meanwhile
        return tokenize(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.writing, "tokenize", slow)
        dist.barrier()
        return data.prepare(config), len(calls)


def test_processes_at_once_tokenize_once(make, tmp_path, pools):
    texts = sentences(50)
    config = make(dataset_name=write_texts(tmp_path / "texts", texts))
    directories, calls = zip(*pools(4).run(prepare_together, config), strict=True)
    assert sum(calls) == 1
    assert len(set(directories)) == 1
    assert read(directories[0]) == pack(encode(config, texts), SEQ)
    folders = [path for path in config.data_dir.iterdir() if path.is_dir()]
    assert folders == [directories[0]]  # no half-made rows beside it


# ---------------------------------------------------------------- refused


def test_missing_text_column(make, tmp_path):
    name = write_lines(
        tmp_path / "texts", [{"texts": t, "id": 1} for t in sentences(9)]
    )
    for given, rule in ((None, " must be given for"), ("txt", "='txt' must be a col")):
        message = refuse(make(dataset_name=name, text_column=given))
        assert message.startswith(f"text_column{rule}")
        assert name in message
        assert "texts, id" in message
        assert message.endswith("try 'texts'")
    data.prepare(make(dataset_name=name, text_column="texts"))


def test_text_column_without_text(make, tmp_path):
    """All have the same fault, and no other column is recommended."""
    name = write_lines(tmp_path / "numbers", [{"text": n, "a": "b"} for n in range(9)])
    message = refuse(make(dataset_name=name))
    assert "none of the first 9 records can be used: line 1 of " in message
    assert "holds int in 'text' instead of text" in message
    assert message.endswith("try one of the forms that README.md shows")


@pytest.mark.parametrize("pack", ["stream", "none", "documents"])
def test_too_few_tokens_for_a_row(make, tmp_path, pack):
    texts = ["", " "]
    name = write_texts(tmp_path / "texts", texts)
    config = make(dataset_name=name, seq_length=512, pack=pack)
    tokens = sum(map(len, encode(config, [text for text in texts if text.strip()])))
    message = refuse(config)
    for part in (name, "at least one row", "seq_length=512", f"{tokens} tokens", "try"):
        assert part in message


def test_percentage_of_no_document(make, tmp_path):
    name = write_texts(tmp_path / "texts", sentences(20))
    message = refuse(make(dataset_name=name, dataset_percentage=1))
    assert message.startswith("dataset_percentage=1 ")
    assert name in message


@pytest.mark.parametrize("exists", [True, False])
def test_no_data_there(make, tmp_path, exists):
    folder = tmp_path / "nothing"
    if exists:
        folder.mkdir()
    message = refuse(make(dataset_name=str(folder)))
    assert message.startswith(f"dataset_name={str(folder)!r} must be a file, a folder")
    assert "try 'Salesforce/wikitext'" in message


def test_dataset_name_that_does_not_exist(make):
    message = refuse(make(dataset_name="no-such/data", dataset_config="small"))
    assert "no-such/data (small)" in message


@pytest.mark.parametrize("text", ["", '{"text": "a"}\n{"text": '], ids=repr)
def test_file_that_cannot_be_read(make, tmp_path, text):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text(text)
    name = str(tmp_path / "texts")
    assert name in refuse(make(dataset_name=name))


def test_no_train_split(make, tmp_path):
    name = write_texts(tmp_path / "texts", sentences(9), split="test")
    message = refuse(make(dataset_name=name))
    assert message == (
        f"dataset_split='train' must be a split of {name!r}, which has test; try 'test'"
    )


def test_tokenizer_without_end_token(make, tmp_path):
    config = make()
    copy = shutil.copytree(config.model_name, tmp_path / "copy")
    change_json(copy / "tokenizer_config.json", eos_token=None)
    message = refuse(replace(config, model_name=str(copy)))
    assert message.startswith(f"model_name={str(copy)!r} must have a tokenizer")
    assert "set eos_token" in message


def test_model_without_tokenizer(make, tmp_path):
    config = make()
    copy = shutil.copytree(config.model_name, tmp_path / "copy")
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert f"model_name={str(copy)!r} must" in refuse(
        replace(config, model_name=str(copy))
    )
