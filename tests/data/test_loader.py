"""Every mesh reads the rows in one order, which a resume repeats."""

import itertools

import numpy as np
import pytest
import torch

from tests.support.texts import SEQ, sentences, write_texts
from tp2d_lib import data
from tp2d_lib.config import ConfigError
from tp2d_lib.data.loader import epoch_order
from tp2d_lib.mesh import build_mesh


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
    epoch_order.cache_clear()
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
    loader.step, loader.position = 5, 5 * 4
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
    rows = np.load(data.prepare(config) / "input_ids.npy").tolist()
    rows = {tuple(row) for row in rows}
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
