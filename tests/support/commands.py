"""The two commands, run as a user runs them: in processes of their own, on the demo."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from tp2d_lib import checkpoint, integrity

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600  # Ray took 136 s to start two workers on a machine under load


def start(script, storage, *flags, **environment):
    """A command of its own, in a session of its own, on the demo."""
    command = [sys.executable, str(ROOT / script), "--offline_demo", "--tp_size", "2"]
    command += ["--storage_path", str(storage), "--checkpoint_every", "2"]
    return run([*command, "--log_interval", "2", *flags], **environment)


def run(command: list[str], **environment) -> subprocess.Popen:
    own = {"RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        command,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, seconds=PATIENCE_S):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def wait_for(condition, process, seconds=PATIENCE_S):
    def is_met():
        met = condition()
        assert met or process.poll() is None, process.communicate()
        return met

    wait_until(is_met, seconds)


def last(run) -> str | None:
    """The run's last checkpoint on record, where Ray puts it once it is whole."""
    of = SimpleNamespace(storage_path=str(run.parent), run_name=run.name)
    return checkpoint.last_of(of)


SAID = (  # all that a command prints; nothing of what it is built on
    r"(held out: )?[\d,]+ documents, [\d,]+ tokens .*",
    r"model: \S+, [\d,]+ parameters, \w+",
    r"mesh: tp \d x dp \d, CPU ranks",
    r"rows: [\d,]+ of \d+ tokens, \d+ in each of [\d,]+ steps",
    r"run: \S+, with all settings in config.yaml",
    r"(started a local|joined the) Ray cluster .*",
    r"started \d workers in \d+ s",
    r"(no GPU: float32 throughout|dtype=).*",
    r"\[[#.]{10}\] step .*",
    r"step \d+: eval_loss [\d.]+",
    r"(resumed after step|changed since step|done: step|exported to|curves:) .*",
    r"(restart|SIGINT|SIGTERM|preemption|waiting|dp_size|nothing left) ?.*",
    r"(fetching|converting) checkpoint-\d+.*, once.*",
)


def finish(process, code=0) -> tuple[str, str]:
    """What a command printed, when it has ended as it must."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, err
    assert "Traceback" not in err
    unknown = [x for x in out.splitlines() if not re.fullmatch("|".join(SAID), x)]
    assert not unknown
    return out, err


def shards(folder) -> dict[str, str]:
    """Checksums of weights, optimizer state and generators."""
    found = {path.name: integrity.digest(path) for path in folder.glob("*.distcp")}
    assert len(found) == 2
    return found


def resume(err) -> subprocess.Popen:
    """The command that a run which ended early tells to resume it with."""
    command = shlex.split(re.search("^to resume: python (.*)$", err, re.MULTILINE)[1])
    return run([sys.executable, *command])
