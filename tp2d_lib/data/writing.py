"""From tokens to the files of rows, and an account of what became of the documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data import packing
from tp2d_lib.data.tokens import TRAINED_ON, Reading, Tokens, tokenize

PIECE = 1 << 20  # tokens looked at together


def write_rows(
    config: TrainConfig,
    tokenizer,
    reading: Reading,
    directory: Path,
    pack: str,
    keep_all: bool,
) -> str:
    """Write the files of ``prepare``; returns what ``describe`` tells."""
    tokens = tokenize(config, tokenizer, reading, directory, keep_all)
    layout = lay_out(tokens, config.seq_length, pack, keep_all)
    if len(layout.filled) == 0:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} of "
            f"{config.dataset_name!r} must fill at least one row of "
            f"seq_length={config.seq_length}, but holds {len(tokens.ids)} tokens; "
            "try dataset_percentage=100 or a shorter seq_length"
        )
    np.save(directory / "lengths.npy", layout.filled)
    shape = (len(layout.filled), config.seq_length)
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    write(directory / "input_ids.npy", shape, tokens.ids, layout, pad)
    if tokens.trained is not None:
        write(directory / "loss_mask.npy", shape, tokens.trained, layout, False)
    if pack == "documents":
        write_starts(directory / "starts.npy", shape, layout)
    about = account(tokens, layout, config.seq_length)
    for leftover in directory.glob("tokens.*"):
        leftover.unlink()
    return about


def lay_out(tokens: Tokens, size: int, pack: str, keep_all: bool) -> packing.Layout:
    if pack == "stream":
        return packing.stream(tokens.lengths, size)
    pieces = packing.cut(tokens.lengths, size)
    # What has nothing to predict, or nothing that counts, makes no row.
    wanted = pieces > 1
    if tokens.trained is not None:
        wanted &= trained_tokens(tokens, pieces) > 0
    if pack == "none" and not keep_all:
        wanted &= packing.first_of(tokens.lengths, size)
    place = packing.one_each if pack == "none" else packing.best_fit
    return place(pieces, wanted, size)


def parts(pieces: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Some pieces at a time, and their tokens, so that memory does not grow."""
    ends = np.append(0, pieces.cumsum())
    cuts = np.searchsorted(ends, np.arange(0, ends[-1], PIECE))
    cuts = np.unique(np.append(cuts, len(pieces)))
    for first, last in pairwise(cuts.tolist()):
        yield slice(first, last), slice(ends[first], ends[last])


def trained_tokens(tokens: Tokens, pieces: np.ndarray) -> np.ndarray:
    """How many tokens of each piece are trained on."""
    counts = [np.zeros(0, int)]
    for some, place in parts(pieces):
        starts = pieces[some].cumsum() - pieces[some]
        counts.append(np.add.reduceat(tokens.trained[place].astype(int), starts))
    return np.concatenate(counts)


def write(path: Path, shape, values: np.ndarray, layout: packing.Layout, empty) -> None:
    """Write each token's value to where the layout has it."""
    rows = np.lib.format.open_memmap(path, "w+", values.dtype, shape)
    for start in range(0, shape[0], 4096):
        rows[start : start + 4096] = empty
    cells = rows.reshape(-1)
    for some, place in parts(layout.pieces):
        pieces, places = layout.pieces[some], layout.places[some]
        # A piece's tokens follow one another here as there.
        shift = places - (pieces.cumsum() - pieces)
        target = np.arange(pieces.sum()) + np.repeat(shift, pieces)
        kept = np.repeat(places >= 0, pieces) & (target < len(cells))
        cells[target[kept]] = values[place][kept]
    rows.flush()


def write_starts(path: Path, shape, layout: packing.Layout) -> None:
    """Mark the first token of each document, and of the padding behind the last."""
    starts = np.lib.format.open_memmap(path, "w+", bool, shape)
    starts.reshape(-1)[layout.places[layout.places >= 0]] = True
    padded = np.flatnonzero(layout.filled < shape[1])
    starts[padded, layout.filled[padded]] = True
    starts.flush()


def account(tokens: Tokens, layout: packing.Layout, size: int) -> str:
    """One line about the documents, their tokens, and what was left out of them."""
    count, used = len(tokens.ids), len(tokens.lengths)
    longer, dropped = (tokens.lengths > size).sum(), count - int(layout.filled.sum())
    told = [f"{used:,} documents, {count:,} tokens ({count / max(used, 1):.0f} each)"]
    if tokens.trained is not None:
        trained = sum(
            int(tokens.trained[start : start + PIECE].sum())
            for start in range(0, count, PIECE)
        )
        told[0] += f", {trained:,} of them trained on"
    told += [  # nobody expects here what is trained on
        f"{n:,} {why}" for why, n in sorted(tokens.why.items()) if why != TRAINED_ON
    ]
    if longer and layout.pieces.size != tokens.lengths.size:  # else they are joined
        told.append(f"{longer:,} longer than a row")
    if dropped:
        told.append(f"{dropped:,} tokens dropped")
    return "; ".join(told)
