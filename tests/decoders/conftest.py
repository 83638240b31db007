"""Processes for the net, each replaced when it died, and what they found out."""

import threading

import pytest

from tests.decoders import results, tiny
from tests.support.pool import Pool

FOUND: dict[str, results.Result] = {}


class Pools:
    """One group of ranks for each kind of work; who dies or hangs is replaced."""

    def __init__(self):
        self.started, self.lock = {}, threading.Lock()

    def run(self, name: str, ranks: int, function, *args) -> list:
        with self.lock:
            if name not in self.started:
                self.started[name] = Pool(ranks)
        try:
            return self.started[name].run(function, *args)
        except BaseException:
            self.close(name)  # a rank may be dead, or wait for another for ever
            raise

    def close(self, name: str) -> None:
        with self.lock:
            self.started.pop(name).close()


@pytest.fixture(scope="session")
def groups():
    groups = Pools()
    yield groups
    for name in list(groups.started):
        groups.close(name)


@pytest.fixture(scope="session")
def found():
    """The results by decoder; when all are there, the page is written."""
    yield FOUND
    if FOUND.keys() == tiny.decoders().keys():
        results.write_page(dict(sorted(FOUND.items())))


def pytest_terminal_summary(terminalreporter):
    if FOUND:
        for line in results.counts(FOUND):
            terminalreporter.write_line(line)
