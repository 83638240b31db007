"""Rows are the documents and nothing else; every mesh reads them in one order."""

import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tp2d_lib import data
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.mesh import build_mesh

SEQ = 16


@pytest.fixture
def make(demo_paths, tmp_path):
    """``make(**settings)``: a config of the demo model with its rows in tmp_path."""
    base = {
        "model_name": demo_paths[0],
        "dataset_name": demo_paths[1],
        "seq_length": SEQ,
        "cache_dir": str(tmp_path / "rows"),
    }
    return lambda **settings: TrainConfig(**{**base, **settings})


def write_lines(directory: Path, documents: list[dict], split: str = "train") -> str:
    directory.mkdir(exist_ok=True)
    lines = [json.dumps(document) + "\n" for document in documents]
    (directory / f"{split}.jsonl").write_text("".join(lines))
    return str(directory)


def write_texts(directory: Path, texts: list, split: str = "train") -> str:
    return write_lines(directory, [{"text": text} for text in texts], split)


def sentences(count: int) -> list[str]:
    return [f"Sentence {n} says that {n * n} is a square." for n in range(count)]


def encode(config: TrainConfig, texts: list[str]) -> list[list[int]]:
    """The documents' tokens, end token last, without any code of the library."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return [[*tokenizer.encode(text), end] for text in texts]


def pack(documents: list[list[int]], seq_length: int) -> list[list[int]]:
    """Full rows of the joined documents."""
    joined = list(itertools.chain(*documents))
    starts = range(0, len(joined) - seq_length + 1, seq_length)
    return [joined[start : start + seq_length] for start in starts]


def read(directory: Path) -> list[list[int]]:
    return np.load(directory / "input_ids.npy").tolist()


def all_rows(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Every prepared row as one micro-batch."""
    loader = data.BatchLoader(config, data.prepare(config), dp_rank=0)
    return loader.micro_batch(np.arange(len(loader.rows)))


def refuse(config: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        data.prepare(config)
    assert not list(config.data_dir.glob(".rows-*"))  # nothing half-made stays
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("workers", [1, 2])
def test_packed_rows_are_the_joined_documents(make, workers):
    config = make(preprocessing_num_workers=workers, seq_length=100)
    lines = Path(config.dataset_name, "train.jsonl").read_text().splitlines()
    documents = encode(config, [json.loads(line)["text"] for line in lines])
    rows = read(data.prepare(config))
    assert rows == pack(documents, 100)
    assert 0 < sum(map(len, documents)) - 100 * len(rows) < 100  # a rest, left out


def test_packed_rows_are_not_padded(make, tmp_path):
    config = make(dataset_name=write_texts(tmp_path / "texts", sentences(9)))
    batch = all_rows(config)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].dtype == torch.int64
    assert data.valid_tokens([batch]) == len(batch["labels"]) * (SEQ - 1)


@pytest.mark.parametrize("pack_rows", [True, False])
def test_empty_documents_are_left_out(make, tmp_path, pack_rows):
    texts = sentences(3)
    holes = ["", texts[0], "  \n", None, texts[1], "", texts[2], *[""] * 1500]
    full = write_texts(tmp_path / "full", texts)
    with_holes = write_texts(tmp_path / "holes", [*holes[7:], *holes])
    config = make(dataset_name=full, pack=pack_rows)
    rows = read(data.prepare(config))
    assert rows
    assert read(data.prepare(replace(config, dataset_name=with_holes))) == rows


def test_padded_rows_are_one_document_each(make, tmp_path):
    texts = ["Short.", *sentences(3), "Very long. " * SEQ, "x"]
    config = make(dataset_name=write_texts(tmp_path / "texts", texts), pack=False)
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
    from datasets import Dataset

    documents = [[], [5], [5, 6], [7], [7, 8, 9]]
    table = {"input_ids": documents, "length": [len(each) for each in documents]}
    monkeypatch.setattr(data, "tokenize", lambda *_: Dataset.from_dict(table))
    batch = all_rows(make(pack=False))
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
    assert {path.name for path in times} == {"input_ids.npy", "lengths.npy"}

    monkeypatch.setattr(data, "tokenize", lambda *_: pytest.fail("tokenised again"))
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
        {"pack": False},
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
    """On every rank: the rows' directory, and how often this rank tokenised."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(config.model_name)  # slow imports, out of the way
    data.load_builder(config)
    tokenize, calls = data.tokenize, []

    def slow(*args):
        calls.append(args)
        time.sleep(0.5)  # so that the others arrive meanwhile
        return tokenize(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "tokenize", slow)
        dist.barrier()
        return data.prepare(config), len(calls)


def test_processes_at_once_tokenise_once(make, tmp_path, pools):
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
    message = refuse(make(dataset_name=name))
    assert message.startswith("text_column='text' must be a column of")
    assert name in message
    assert "texts, id" in message
    assert message.endswith("try 'texts'")
    data.prepare(make(dataset_name=name, text_column="texts"))


def test_text_column_without_text(make, tmp_path):
    name = write_lines(tmp_path / "numbers", [{"text": n} for n in range(9)])
    assert "text_column='text' must" in refuse(make(dataset_name=name))


@pytest.mark.parametrize("pack_rows", [True, False])
def test_too_few_tokens_for_a_row(make, tmp_path, pack_rows):
    texts = ["Few words."] if pack_rows else ["", " "]
    name = write_texts(tmp_path / "texts", texts)
    config = make(dataset_name=name, seq_length=512, pack=pack_rows)
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
    assert message.startswith(
        f"dataset_name={str(folder)!r} must be a folder with data"
    )
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


# ---------------------------------------------------------------- order


@pytest.fixture
def load(make, tmp_path):
    """``load(count, dp_rank, **settings)``: a loader of rows that hold their number."""

    def loader(count: int, dp_rank: int = 0, **settings) -> data.BatchLoader:
        directory = tmp_path / f"{count}-rows"
        if not directory.exists():
            directory.mkdir()
            rows = np.arange(count, dtype=np.int32)[:, None].repeat(SEQ, 1)
            np.save(directory / "input_ids.npy", rows)
            np.save(directory / "lengths.npy", np.full(count, SEQ, np.int32))
        return data.BatchLoader(make(**settings), directory, dp_rank)

    return loader


def numbers(batch: list[dict[str, torch.Tensor]]) -> list[int]:
    """The rows of one step of one dp rank, in order."""
    return [n for micro in batch for n in micro["input_ids"][:, 0].tolist()]


def steps(loader: data.BatchLoader) -> list[list[int]]:
    return [numbers(batch) for batch in loader]


def stream(loader: data.BatchLoader) -> list[int]:
    return list(itertools.chain(*steps(loader)))


def test_batches_have_the_shape_asked_for(load):
    loader = load(12, batch_size_per_gpu=3, gradient_accumulation_steps=2, num_epochs=1)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [2, 2]
    for micro in itertools.chain(*batches):
        assert micro["input_ids"].shape == micro["labels"].shape == (3, SEQ)


def test_order_depends_on_seed_and_epoch_only(load):
    order = stream(load(20, num_epochs=3))
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3

    torch.manual_seed(7)
    np.random.seed(7)
    data.epoch_order.cache_clear()
    assert stream(load(20, num_epochs=2)) == order[:40]
    assert stream(load(20, num_epochs=3, batch_size_per_gpu=5)) == order
    assert stream(load(20, num_epochs=3, gradient_accumulation_steps=4)) == order
    assert stream(load(20, num_epochs=1, seed=43)) != order[:20]


@pytest.mark.parametrize(
    ("dp_size", "batch_size", "accumulation"),
    [(1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)],
)
def test_every_mesh_takes_the_same_rows_in_a_step(
    load, dp_size, batch_size, accumulation
):
    """10 rows, 4 a step: the third step straddles two epochs."""
    expected = [sorted(step) for step in steps(load(10, batch_size_per_gpu=4))]
    settings = {
        "dp_size": dp_size,
        "batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    ranks = [steps(load(10, dp_rank, **settings)) for dp_rank in range(dp_size)]
    together = [sorted(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]
    assert together == expected
    assert len(together) == 7


def test_every_row_once_an_epoch(load):
    ranks = [stream(load(24, n, dp_size=4, num_epochs=1)) for n in range(4)]
    assert sorted(itertools.chain(*ranks)) == list(range(24))


@pytest.mark.parametrize("position", range(0, 30, 3))
def test_starts_at_any_position(load, position):
    """Not only at a whole step: a run may have gone on with another batch size."""
    order = stream(load(10, num_epochs=3))
    loader = load(10, num_epochs=3, batch_size_per_gpu=4)
    loader.position = position
    whole = (30 - position) // 4
    assert loader.steps_left == whole
    assert stream(loader) == order[position : position + 4 * whole]
    assert loader.position == position + 4 * whole
    assert loader.steps_left == 0


def test_resumes_with_the_tail_of_the_run(load):
    full = list(load(10, batch_size_per_gpu=4))
    for done in range(len(full)):
        loader = load(10, batch_size_per_gpu=4)
        loader.position = done * 4
        for batch, expected in zip(loader, full[done:], strict=True):
            for micro, other in zip(batch, expected, strict=True):
                assert torch.equal(micro["input_ids"], other["input_ids"])
                assert torch.equal(micro["labels"], other["labels"])


def test_resumes_on_another_mesh(load):
    one = load(10, batch_size_per_gpu=4)
    before = [numbers(next(iter(one))) for _ in range(3)]
    ranks = [load(10, n, dp_size=2, batch_size_per_gpu=2) for n in range(2)]
    for loader in ranks:
        loader.position = one.position
    after = [a + b for a, b in zip(*map(steps, ranks), strict=True)]
    assert before + after == steps(load(10, batch_size_per_gpu=4))


@pytest.mark.parametrize(
    ("rows", "epochs", "max_steps", "expected"),
    [
        (10, 1, None, 2),
        (10, 3, None, 7),
        (12, 2, None, 6),
        (3, 2, None, 1),
        (10, 3, 5, 5),
        (10, 3, 7, 7),
        (10, 3, 99, 7),
    ],
)
def test_number_of_steps(load, rows, epochs, max_steps, expected):
    sizes = {"dp_size": 2, "batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    loader = load(rows, num_epochs=epochs, max_steps=max_steps, **sizes)
    assert loader.steps_left == expected
    assert len(list(loader)) == expected


def test_nothing_left_after_the_end(load):
    """A run that went further than a smaller max_steps has ended."""
    loader = load(10, batch_size_per_gpu=4, max_steps=2)
    loader.position = 5 * 4
    assert loader.steps_left == 0
    assert list(itertools.islice(loader, 3)) == []


def test_too_few_rows_for_one_step(load):
    sizes = {"batch_size_per_gpu": 8, "dp_size": 4}
    with pytest.raises(ConfigError) as caught:
        load(10, num_epochs=3, **sizes)
    message = str(caught.value)
    for part in ("num_epochs=3", "10 rows", "32 rows"):
        assert part in message
    assert message.endswith("try num_epochs=4")
    assert load(10, num_epochs=4, **sizes).steps_left == 1


def rows_of_rank(config):
    """On every rank: its place in the mesh and the rows of each of its steps."""
    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    loader = data.build_dataloader(config, mesh)
    return mesh.get_coordinate(), [
        torch.cat([micro["input_ids"] for micro in batch]).tolist() for batch in loader
    ]


def test_loader_follows_dp_rank(make, tmp_path, pools):
    texts = sentences(40)
    config = make(
        dataset_name=write_texts(tmp_path / "texts", texts),
        dp_size=2,
        tp_size=2,
        batch_size_per_gpu=2,
        gradient_accumulation_steps=2,
        num_epochs=1,
    )
    rows = {tuple(row) for row in read(data.prepare(config))}
    found = {tuple(place): each for place, each in pools(4).run(rows_of_rank, config)}
    assert found[0, 0] == found[0, 1]
    assert found[1, 0] == found[1, 1]
    first, second = (
        [tuple(row) for step in found[dp_rank, 0] for row in step]
        for dp_rank in range(2)
    )
    assert first
    assert len(first) == len(second)
    assert len({*first, *second}) == len(first) + len(second)  # no row twice
    assert {*first, *second} <= rows
