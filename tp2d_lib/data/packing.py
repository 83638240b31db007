"""Which token of which document goes where: the layout of rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

WINDOW = 1 << 22  # tokens packed together, so that memory does not grow with the data
NOWHERE = -1


class Layout(NamedTuple):
    """Documents as pieces, in order, and where each goes.

    ``pieces`` are their lengths; ``places`` their first tokens' positions in the rows
    one after another, or -1 for what is dropped; ``filled`` the tokens in each row.
    """

    pieces: np.ndarray
    places: np.ndarray
    filled: np.ndarray


def stream(lengths: np.ndarray, size: int) -> Layout:
    """All documents joined, and cut into rows, of which only the last has padding.

    A row of one token has nothing to predict and is never made.
    """
    ends = lengths.cumsum()
    full, rest = divmod(int(lengths.sum()), size)
    filled = [size] * full + [rest] * (rest > 1)
    return Layout(lengths, ends - lengths, np.array(filled, np.int32))


def cut(lengths: np.ndarray, size: int) -> np.ndarray:
    """The lengths of pieces of at most ``size``: those of one document follow another.

    Returns:
        (pieces,) lengths, those of a document adding up to its length.
    """
    full, rest = np.divmod(lengths, size)
    counts = full + (rest > 0)
    pieces = np.full(counts.sum(), size, np.int64)
    has_rest = rest > 0
    pieces[counts.cumsum()[has_rest] - 1] = rest[has_rest]
    return pieces


def first_of(lengths: np.ndarray, size: int) -> np.ndarray:
    """Of the pieces that ``cut`` makes, whether each is its document's first."""
    counts = -(-lengths // size)
    firsts = np.zeros(counts.sum(), bool)
    firsts[(counts.cumsum() - counts)[counts > 0]] = True
    return firsts


def one_each(pieces: np.ndarray, wanted: np.ndarray, size: int) -> Layout:
    """A row for each wanted piece."""
    rows = wanted.cumsum() - 1
    places = np.where(wanted, rows * size, NOWHERE)
    return Layout(pieces, places, pieces[wanted].astype(np.int32))


def best_fit(pieces: np.ndarray, wanted: np.ndarray, size: int) -> Layout:
    """Several pieces in a row, none of them cut: the longest first, each where least
    is left over.

    Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et
    al., 2024), for a window of pieces at a time.
    """
    places = np.full(len(pieces), NOWHERE, np.int64)
    filled: list[int] = []
    chosen = np.flatnonzero(wanted)
    window = pieces[chosen].cumsum() // WINDOW
    for part in np.split(chosen, np.flatnonzero(np.diff(window)) + 1):
        place_window(pieces, part, size, places, filled)
    return Layout(pieces, places, np.array(filled, np.int32))


def place_window(
    pieces: np.ndarray, part: np.ndarray, size: int, places: np.ndarray, filled: list
) -> None:
    """Fill new rows with some pieces."""
    rows: dict[int, list[int]] = {}  # space left -> rows that have so much
    spaces: list[int] = []  # the keys, sorted
    for piece in part[np.argsort(-pieces[part], kind="stable")].tolist():
        length = int(pieces[piece])
        index = bisect_left(spaces, length)
        if index == len(spaces):
            space, row = size, len(filled)
            filled.append(0)
        else:
            space = spaces[index]
            row = rows[space].pop()
            if not rows[space]:
                del rows[space], spaces[index]
        places[piece] = row * size + size - space
        filled[row] += length
        if left := space - length:
            if left not in rows:
                insort(spaces, left)
            rows.setdefault(left, []).append(row)
