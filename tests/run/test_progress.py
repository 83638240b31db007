"""What a person sees while a run goes on, on a terminal and in a file."""

import os
import pty
import subprocess
import sys

from tp2d_lib.run import display, progress

SHOW = """
from tp2d_lib.run import display
terminal = display.Terminal()
show = terminal.show
for step in (10, 20, 100_000):
    record = {"step": step, "step_time": 0.5, "loss": 2.5, "tokens_per_second": 1e6}
    show(display.line(record, 100_000), done=step == 20)
terminal.end()
print("failed: on a line of its own")
"""


def test_a_line_tells_loss_speed_and_time_left():
    record = {"step": 10, "step_time": 2.0, "loss": 2.5, "tokens_per_second": 1234.4}
    said = display.line(record | {"mfu": 0.41}, 2000)
    assert said == (
        "[..........] step 10/2000  loss 2.500  1,234 tokens/s  1:06:20 left  MFU 41%"
    )


def test_one_line_on_a_terminal_however_narrow():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60"}
    subprocess.run([sys.executable, "-c", SHOW], stdout=theirs, env=environment)
    os.close(theirs)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    kept, last, failed = text.split("\r\n")[:-1]
    replaced, done = kept.split("\r\x1b[K")[1:]
    assert replaced.startswith("[..........] step 10/100000  loss 2.500")
    assert len(replaced) == 59
    assert done.endswith(" left")  # whole: nothing replaces it
    assert last.startswith("\r\x1b[K[##########] step 100000/100000")
    assert failed == "failed: on a line of its own"


def test_plain_lines_in_a_file():
    run = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True)
    *lines, failed = run.stdout.splitlines()
    assert failed.startswith("failed: ")
    assert [line.split()[2] for line in lines] == [
        "10/100000",
        "20/100000",
        "100000/100000",
    ]
    assert "\r" not in run.stdout


def test_all_ranks_get_the_same_last_step():
    """Whoever asks first or last: no rank stops at a step that another has passed."""
    actor = progress.ProgressActor()
    answers = [actor.begin(step, 3) for step in (1, 2, 1, 2)]  # the third is late
    assert answers[:2] == answers[2:]  # the time as well
    assert not any(last for last, _ in answers)
    actor.stop()
    assert actor.begin(2, 3) == answers[1]
    first, second = actor.begin(3, 3), actor.begin(3, 3)
    assert first == second
    assert first[0]
    actor.stop()  # again changes nothing
    assert actor.begin(3, 3) == first


def test_a_rank_may_run_far_ahead():
    """As the host of a GPU does, which waits for no step until it reads a loss."""
    actor, steps = progress.ProgressActor(), range(1, 41)
    ahead, *others = [[actor.begin(step, 4) for step in steps] for _ in range(4)]
    assert others == [ahead] * 3
    assert len({now for _, now in ahead}) == len(steps)
    assert not actor.begun  # nothing is kept of steps that all have begun


def test_a_process_with_jupyters_libraries_is_no_notebook():
    """Such as one that runs notebooks: there is no page to update."""
    import ipykernel  # noqa: F401
    import IPython  # noqa: F401

    assert isinstance(display.here(), display.Terminal)


def test_the_actor_imports_no_torch():
    """It would keep the driver waiting for it."""
    run = "import sys, tp2d_lib.run.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", run]).returncode == 0
