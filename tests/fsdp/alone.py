"""An installation of what tp2d_lib needs at least: no DeepSpeed, no notebook, no test.

``make test-fsdp2-only`` makes the environment and runs this; ``make test`` does not.
"""

import os
import subprocess

from tests.support.commands import ROOT

PYTHON = ROOT / "build/fsdp2-env/bin/python"


def run(script: str, folder, *flags: str) -> subprocess.CompletedProcess:
    command = [PYTHON, ROOT / script, "--offline_demo", "--tp_size", "2", *flags]
    command += ["--storage_path", folder, "--run_name", "alone"]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
    )


def test_it_trains_saves_and_resumes(tmp_path):
    for steps in (4, 6):
        done = run("train_fsdp.py", tmp_path, "--max_steps", str(steps))
        assert done.returncode == 0, done.stderr
        assert f"done: step {steps}" in done.stdout
    assert "resumed after step 4" in done.stdout


def test_the_other_command_says_what_is_missing(tmp_path):
    done = run("train_deepspeed.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: train_deepspeed.py must find the package deep"
    )
