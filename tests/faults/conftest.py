"""Faults are counted: survived / tried, for each class of them."""

from collections import Counter

import pytest

TRIED, SURVIVED = Counter(), Counter()


@pytest.fixture(scope="session")
def survived():
    """``survived(kind, good)``: count a fault of a kind; returns ``good``."""

    def count(kind: str, good: bool) -> bool:
        TRIED[kind] += 1
        SURVIVED[kind] += good
        return good

    return count


def pytest_terminal_summary(terminalreporter):
    for kind, tried in sorted(TRIED.items()):
        terminalreporter.write_line(f"{kind}: survived {SURVIVED[kind]} / {tried}")
