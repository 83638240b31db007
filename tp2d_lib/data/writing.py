"""From tokens to the files of rows, and an account of what became of the documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data import packing
from tp2d_lib.data.sources import Source, listed
from tp2d_lib.data.tokens import TRAINED_ON, tokenize


def write_rows(
    config: TrainConfig,
    tokenizer,
    source: Source,
    directory: Path,
    pack: str,
    keep_all: bool,
) -> str:
    """Write the files of ``prepare``; returns what ``describe`` tells."""
    cache = directory / "tokens.arrow"
    documents = tokenize(config, tokenizer, source, cache, keep_all)
    lengths = column(documents, "length")
    layout = lay_out(documents, lengths, config.seq_length, pack, keep_all)
    if len(layout.filled) == 0:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} of "
            f"{config.dataset_name!r} must fill at least one row of "
            f"seq_length={config.seq_length}, but holds {int(lengths.sum())} tokens; "
            "try dataset_percentage=100 or a shorter seq_length"
        )
    np.save(directory / "lengths.npy", layout.filled)
    shape = (len(layout.filled), config.seq_length)
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    write(directory / "input_ids.npy", shape, np.int32, documents, layout, pad)
    if "trained" in documents.column_names:
        write(directory / "loss_mask.npy", shape, bool, documents, layout, False)
    if pack == "documents":
        write_starts(directory / "starts.npy", shape, layout)
    for leftover in directory.glob("tokens*"):  # one from each process
        leftover.unlink()
    return account(documents, lengths, layout, source, config.seq_length)


def lay_out(
    documents, lengths: np.ndarray, size: int, pack: str, keep_all: bool
) -> packing.Layout:
    if pack == "stream":
        return packing.stream(lengths, size, keep_all)
    pieces = packing.cut(lengths, size)
    # What has nothing to predict, or nothing that counts, makes no row.
    wanted = pieces > 1
    if "trained" in documents.column_names:
        wanted &= trained_tokens(documents, pieces) > 0
    if pack == "none" and not keep_all:
        wanted &= packing.first_of(lengths, size)
    place = packing.one_each if pack == "none" else packing.best_fit
    return place(pieces, wanted, size)


def trained_tokens(documents, pieces: np.ndarray) -> np.ndarray:
    """How many tokens of each piece are trained on."""
    counts, ends, done, first = np.zeros(len(pieces), int), pieces.cumsum(), 0, 0
    for mask in flat(documents, "trained"):
        last = int(np.searchsorted(ends, done + len(mask), "right"))
        if last > first:
            starts = (ends - pieces)[first:last] - done
            counts[first:last] = np.add.reduceat(mask.astype(int), starts)
        done, first = done + len(mask), last
    return counts


def write(path: Path, shape, kind, documents, layout: packing.Layout, empty) -> None:
    """Write a token's id, or whether it is trained on, to where the layout has it."""
    rows = np.lib.format.open_memmap(path, "w+", kind, shape)
    for start in range(0, shape[0], 4096):
        rows[start : start + 4096] = empty
    cells, ends = rows.reshape(-1), layout.pieces.cumsum()
    done = first = 0
    for values in flat(documents, "trained" if kind is bool else "input_ids"):
        last = int(np.searchsorted(ends, done + len(values), "right"))
        pieces, places = layout.pieces[first:last], layout.places[first:last]
        # A piece's tokens follow one another here as there.
        shift = places - (ends[first:last] - pieces - done)
        target = np.arange(len(values)) + np.repeat(shift, pieces)
        kept = np.repeat(places >= 0, pieces) & (target < len(cells))
        cells[target[kept]] = values[kept]
        done, first = done + len(values), last
    rows.flush()


def write_starts(path: Path, shape, layout: packing.Layout) -> None:
    """Mark the first token of each document, and of the padding behind the last."""
    starts = np.lib.format.open_memmap(path, "w+", bool, shape)
    starts.reshape(-1)[layout.places[layout.places >= 0]] = True
    padded = np.flatnonzero(layout.filled < shape[1])
    starts[padded, layout.filled[padded]] = True
    starts.flush()


def flat(documents, name: str) -> Iterator[np.ndarray]:
    """The values of a column of lists, some documents at a time."""
    for batch in documents.select_columns(name).with_format("arrow").iter(1000):
        yield batch[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def column(documents, name: str) -> np.ndarray:
    """A column of numbers."""
    batches = documents.select_columns(name).with_format("arrow").iter(100_000)
    return np.concatenate([b[name].to_numpy() for b in batches] or [np.zeros(0, int)])


def account(
    documents, lengths: np.ndarray, layout: packing.Layout, source: Source, size: int
) -> str:
    """One line about the documents, their tokens, and all that was left out."""
    why = Counter()
    reasons = documents.select_columns("left_out").with_format("arrow")
    for batch in reasons.iter(100_000):
        for each in batch["left_out"].value_counts().to_pylist():
            why[each["values"]] += each["counts"]
    used, tokens = why.pop("", 0), int(lengths.sum())
    del why[TRAINED_ON]  # nobody expects those here
    longer, dropped = (lengths > size).sum(), tokens - int(layout.filled.sum())
    parts = [
        f"{used:,} documents, {tokens:,} tokens ({tokens / max(used, 1):.0f} each)",
        *(f"{count:,} {reason}" for reason, count in sorted(why.items())),
    ]
    if "trained" in documents.column_names:
        trained = sum(int(mask.sum()) for mask in flat(documents, "trained"))
        parts[0] += f", {trained:,} of them trained on"
    if longer and layout.pieces.size != lengths.size:  # else they are joined anyway
        parts.append(f"{longer:,} longer than a row")
    if dropped:
        parts.append(f"{dropped:,} tokens dropped")
    if source.left_out:
        parts.append(f"files not read: {listed(source.left_out)}")
    return "; ".join(parts)
