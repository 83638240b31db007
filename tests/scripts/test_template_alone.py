"""A template runs in a copy of its folder, and its lock reaches the workers.

Too slow for `make test`: `make template` runs them.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pytest

from scripts import make_template, run_notebooks

NAME = "tp2d_fsdp2_dtensor"
# Python runs it at the start: nothing of this repository can be imported any more.
HIDE = """\
import sys
sys.meta_path = [
    finder for finder in sys.meta_path
    if "__editable__" not in getattr(finder, "__module__", "")
]
"""
WHERE = "import tp2d_lib; print(*tp2d_lib.__path__)"
ON_A_WORKER = """\
import ray
from tp2d_lib.run import launch
launch.connect(pip="lock.txt")
@ray.remote
def version():
    import tp2d_lib, tp2d_tiny
    return tp2d_tiny.VERSION
print("worker has", ray.get(version.remote()))
"""


@pytest.mark.faults
def test_a_template_needs_nothing_but_its_folder(tmp_path, monkeypatch):
    make_template.make(tmp_path / "template")
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "template" / "templates" / NAME, alone)
    notebook = nbformat.read(alone / "README.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE))
    nbformat.write(notebook, alone / "README.ipynb")
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hide"))
    command = [sys.executable, "-c", "import tp2d_lib"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1

    executed = run_notebooks.execute(alone / "README.ipynb", tmp_path / "build", {})
    where = nbformat.read(executed, as_version=4).cells[-1].outputs[0].text
    assert where == f"{alone / 'tp2d_lib'}\n"
    assert "resume error after SIGKILL  0.0" in run_notebooks.summary(executed)


def write_wheel(folder) -> str:
    """A package without a network; returns the SHA-256 of its wheel."""
    wheel, info = folder / "tp2d_tiny-1.0-py3-none-any.whl", "tp2d_tiny-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tp2d_tiny.py", "VERSION = '1.0'\n")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tp2d-tiny\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.mark.faults
def test_workers_of_a_ray_job_get_the_packages_of_the_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(make_template.ROOT))
    digest = write_wheel(tmp_path)
    (tmp_path / "lock.txt").write_text(
        f"--no-index\n--find-links {tmp_path}\n"
        f"tp2d-tiny==1.0 \\\n    --hash=sha256:{digest}\n"
    )
    job = {"runtime_env": {"working_dir": str(tmp_path), "env_vars": {"HF_TOKEN": "x"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    command = [sys.executable, "-c", ON_A_WORKER]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "worker has 1.0" in result.stdout, result.stderr
