"""Rows that changed on disk are made again, or refused if they are the user's own."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_rows import change_json, read, refuse
from tests.support.texts import SEQ, sentences, write_lines, write_texts
from tp2d_lib import data
from tp2d_lib.config import ConfigError
from tp2d_lib.data import checks


@pytest.fixture
def config(make, tmp_path):
    return make(dataset_name=write_texts(tmp_path / "texts", sentences(20)))


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # a token or a length, not the header
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [zero, flip, halve, Path.unlink])
@pytest.mark.parametrize("name", checks.FILES)
def test_cached_rows_are_made_again(config, capsys, name, damage):
    directory = data.prepare(config)
    rows = read(directory)
    given = replace(config, prepared_data=str(directory))
    damage(directory / name)
    assert f"prepared_data={str(directory)!r} must be a folder wr" in refuse(given)
    assert data.prepare(config) == directory
    said = capsys.readouterr().out.strip()
    assert said.startswith(f"{directory} is made anew, because {name} ")
    assert read(directory) == rows
    data.prepare(given)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("damage", [zero, flip, halve, Path.unlink])
@pytest.mark.parametrize("name", checks.MASKS)
def test_masks_are_compared_too(make, tmp_path, capsys, name, damage):
    pairs = [{"prompt": text, "completion": text} for text in sentences(20)]
    config = make(dataset_name=write_lines(tmp_path / "pairs", pairs))
    directory = data.prepare(config)
    before = [mask.tolist() for mask in data.open_rows(directory)[2:]]
    damage(directory / name)
    assert data.prepare(config) == directory
    assert f"made anew, because {name} " in capsys.readouterr().out
    assert [mask.tolist() for mask in data.open_rows(directory)[2:]] == before


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (np.ones((5, SEQ), np.int8), "loss_mask.npy holds int8, not bools"),
        (np.ones((4, SEQ), bool), f"the shape (4, {SEQ}), not (5, {SEQ})"),
    ],
)
def test_masks_of_others_are_looked_through(make, tmp_path, mask, sentence):
    name = foreign(tmp_path / "rows", ROWS, LENGTHS)
    np.save(Path(name) / "loss_mask.npy", mask)
    assert sentence in refuse(make(prepared_data=name))


def test_a_mask_that_is_added_is_damage(config, capsys):
    directory = data.prepare(config)
    np.save(directory / "loss_mask.npy", np.ones((3, SEQ), bool))
    data.prepare(config)
    assert "because loss_mask.npy has changed" in capsys.readouterr().out


def test_damaged_checksums_are_no_better(config, capsys):
    directory = data.prepare(config)
    zero(directory / checks.CHECKSUMS)
    data.prepare(config)
    assert f"because {checks.CHECKSUMS} has changed" in capsys.readouterr().out


def foreign(folder: Path, rows, lengths) -> str:
    """Rows that somebody else wrote, without checksums."""
    folder.mkdir()
    np.save(folder / "input_ids.npy", rows)
    np.save(folder / "lengths.npy", lengths)
    return str(folder)


ROWS, LENGTHS = np.full((5, SEQ), 7, np.int32), np.full(5, SEQ, np.int32)


@pytest.mark.parametrize(
    ("rows", "lengths", "sentence"),
    [
        (ROWS * 1000, LENGTHS, "token ids below 2048, the vocabulary of"),
        (-ROWS, LENGTHS, "holds the token id -7"),
        (ROWS, LENGTHS + 1, f"holds lengths from {SEQ + 1} to {SEQ + 1}"),
        (ROWS, LENGTHS * 0, "holds lengths from 0 to 0"),
        (ROWS, LENGTHS[1:], f"the shapes are (5, {SEQ}) and (4,)"),
        (ROWS[:0], LENGTHS[:0], f"the shapes are (0, {SEQ}) and (0,)"),
        (ROWS / 2, LENGTHS, "holds float64, not integers"),
        (ROWS.astype(object), LENGTHS, "input_ids.npy cannot be read"),
    ],
)
def test_rows_of_others_are_looked_through(
    make, tmp_path, monkeypatch, rows, lengths, sentence
):
    monkeypatch.setattr(checks, "PIECE", 2 * SEQ)  # several pieces, the last a rest
    good = make(prepared_data=foreign(tmp_path / "good", ROWS, LENGTHS))
    assert data.prepare(good) == tmp_path / "good"
    bad = foreign(tmp_path / "bad", rows, lengths)
    assert sentence in refuse(make(prepared_data=bad))


def test_one_token_beyond_the_vocabulary(make, tmp_path):
    rows = ROWS.copy()
    rows[-1, -1] = 2048
    name = foreign(tmp_path / "rows", rows, LENGTHS)
    assert "but yields 2048" in refuse(make(prepared_data=name))


def test_a_tokenizer_with_more_tokens_than_the_model(config, tmp_path):
    small = shutil.copytree(config.model_name, tmp_path / "small")
    change_json(small / "config.json", vocab_size=300)
    message = refuse(replace(config, model_name=str(small)))
    assert message.startswith(f"model_name={str(small)!r} must yield token ids below 3")


def test_a_rank_reads_what_the_driver_compared(config, tmp_path, monkeypatch):
    """Hours of hashing for each rank would be in vain: it checks the shapes only."""
    given = replace(config, prepared_data=str(data.prepare(config)))
    monkeypatch.setattr(checks, "vocabulary", lambda _: pytest.fail("hashed again"))
    mesh = {"dp": type("OneRank", (), {"get_local_rank": lambda self: 0})()}
    assert data.build_dataloader(given, mesh).steps_left
    with pytest.raises(ConfigError, match="must hold rows of seq_length=8"):
        data.build_dataloader(replace(given, seq_length=8), mesh)
