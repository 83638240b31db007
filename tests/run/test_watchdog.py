"""What counts as a hang, on a clock of our own."""

import pytest

from tp2d_lib.run.watchdog import Watchdog


class Ranks:
    """Four ranks that send a sign of life every second, unless told otherwise."""

    def __init__(self, timeout=None):
        self.watchdog, self.now = Watchdog(timeout), 0
        self.beats = {}
        for rank in range(4):
            self.beats[rank] = {"count": 0, "written": 0, "host": f"node{rank // 2}"}
            self.set(rank, step=1, phase="step", where="all_reduce (c10d.py:1)")

    def set(self, rank, **values):
        self.beats[rank] |= values

    def all(self, **values):
        for rank in self.beats:
            self.set(rank, **values)

    def wait(self, seconds, silent=()):
        """What is said first within these seconds, and when."""
        for _ in range(seconds):
            self.now += 1
            for rank in self.beats.keys() - set(silent):
                self.beats[rank]["count"] += 1
            if said := self.watchdog.judge(self.beats, self.now):
                return said
        return None

    def walk(self, steps, seconds):
        for step in range(1, steps + 1):
            self.all(step=step, phase="step")
            assert self.wait(seconds) is None


def test_a_rank_that_falls_silent_is_named():
    ranks = Ranks(timeout=10)
    ranks.walk(17, seconds=1)
    said = ranks.wait(20, silent=[3])
    assert said == "rank 3 on host node1 has said nothing since step 17 (11 s)"


def test_ranks_behind_the_furthest_step_come_first():
    ranks = Ranks(timeout=10)
    ranks.walk(3, seconds=1)
    for rank in (0, 1, 3):
        ranks.set(rank, step=4)
    ranks.set(2, where="read (store.py:5)")
    assert ranks.wait(20) == (
        "no rank has finished a step for 11 s: rank 2 on host node1 at step 3 in "
        "read (store.py:5); ranks 0, 1, 3 on host node0 at step 4 in "
        "all_reduce (c10d.py:1)"
    )


def test_the_default_grows_with_the_slowest_step():
    ranks = Ranks()
    ranks.walk(3, seconds=10)
    assert ranks.wait(100) is None
    assert "for 121 s" in ranks.wait(100)
    slow = Ranks()
    slow.walk(3, seconds=60)
    assert slow.wait(230) is None
    assert "for 301 s" in slow.wait(100)


OTHERS = ["load", "first step", "on_step_end", "profile", "evaluate", "save", "end"]


@pytest.mark.parametrize("phase", OTHERS)
def test_other_phases_take_as_long_as_they_take(phase):
    """Even if only one rank is in it; but silence ends after ten minutes."""
    ranks = Ranks(timeout=10)
    ranks.walk(3, seconds=1)
    ranks.set(0, phase=phase)
    assert ranks.wait(3600) is None
    ranks.all(phase=phase)
    for line in range(6):  # one rank moves on, the others wait for it
        ranks.set(0, where=f"write (integrity.py:{line})")
        assert ranks.wait(590) is None
    ranks.set(0, where="read (integrity.py:1)")
    assert ranks.wait(590, silent=[0]) is None
    assert ranks.wait(20, silent=[0]).startswith("rank 0 on host node0 has said")
    ranks.all(phase="end")
    ranks.set(0, phase="done")
    assert ranks.wait(3600, silent=[0]) is None


@pytest.mark.parametrize("phase", ["evaluate", "save"])
def test_ranks_that_wait_for_each_other_for_ever_are_noticed(phase):
    """They answer, but in ten minutes none of them has left its line."""
    ranks = Ranks(timeout=10)
    ranks.walk(3, seconds=1)
    ranks.all(phase=phase)
    ranks.set(2, where="gather_object (saving.py:71)")
    assert ranks.wait(600) is None
    assert ranks.wait(5).startswith(
        "no rank has left its line of code for 601 s: rank 2 on host node1 at step 3 in"
    )


def test_ranks_may_wait_long_for_a_write_that_makes_progress():
    """In a thread of one of them, which is at the same line all the time, or nearly."""
    ranks = Ranks(timeout=10)
    ranks.walk(3, seconds=1)
    ranks.all(phase="save", where="write (integrity.py:25)")
    for written in range(1, 6):
        ranks.set(1, written=written << 30)
        assert ranks.wait(590) is None
    ranks.all(phase="earlier save", where="await_earlier (saving.py:80)")
    assert ranks.wait(3600) is None  # until a store has confirmed the last file
    ranks.set(1, written=6 << 30)
    assert ranks.wait(3600) is None
    assert ranks.wait(5).startswith("no rank has left its line of code for 3601 s: ")


@pytest.mark.parametrize(
    "phase", ["load", "first step", "on_step_end", "profile", "end"]
)
def test_a_phase_of_one_long_call_may_stand_still(phase):
    """A download, a compilation, an evaluation of one's own, an export."""
    ranks = Ranks(timeout=10)
    ranks.walk(3, seconds=1)
    ranks.all(phase=phase)
    assert ranks.wait(3600) is None


def test_time_in_which_all_slept_does_not_count():
    ranks = Ranks(timeout=10)
    ranks.walk(3, seconds=1)
    ranks.now += 1000
    assert ranks.wait(2, silent=range(4)) is None  # they wake up as well
    ranks.walk(4, seconds=3)
    assert ranks.wait(12, silent=[1]).startswith("rank 1 on host node0")
