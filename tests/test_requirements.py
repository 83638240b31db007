"""Who needs what: pyproject.toml's names, requirements.txt's pins, imports, and CI."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from itertools import chain
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as name_of

from tests.support.pins import read_pins

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
ONLY_FOR = {  # a part of the library, and the extra that it needs
    "autotp": "deepspeed",
    "cost": "deepspeed",  # for that engine
    "lessons": "notebooks",
    "run/display.py": "notebooks",  # where it runs in one
}


def parsed(lines: Iterable[str]) -> dict[str, Requirement]:
    found = map(Requirement, lines)
    return {name_of(requirement.name): requirement for requirement in found}


RUNTIME = parsed(PROJECT["project"]["dependencies"])
NAMED = RUNTIME | parsed(PROJECT["dependency-groups"]["test"])
NAMED |= parsed(chain.from_iterable(EXTRAS.values()))


def test_every_pin_is_named_and_allowed():
    for name, pin in read_pins().items():
        (exact,) = pin.specifier
        assert exact.operator == "==", name
        assert NAMED[name_of(name)].specifier.contains(exact.version), name


def test_what_is_installed_is_allowed():
    for name, requirement in NAMED.items():
        assert requirement.specifier.contains(version(name)), name


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - {*sys.stdlib_module_names, "tp2d_lib"}


def test_the_library_imports_what_it_names():
    distributions, used = packages_distributions(), set()
    for path in sorted((ROOT / "tp2d_lib").rglob("*.py")):
        place = path.relative_to(ROOT / "tp2d_lib").as_posix()
        part = next((part for part in ONLY_FOR if place.startswith(part)), None)
        extra = parsed(EXTRAS[ONLY_FOR[part]]) if part else {}
        for module in imports_of(path) - ({"IPython"} if part else set()):
            name = name_of(distributions[module][0])
            assert name in RUNTIME | extra, f"{place} imports {module}"
            used.add(name)
    unused = RUNTIME.keys() - used
    assert unused == {"tensorboard"}  # torch.utils.tensorboard imports it


def test_ci_runs_commands_that_exist_on_pythons_that_are_allowed():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    allowed = Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    for name, job in workflow["jobs"].items():
        steps = job["steps"]
        commands = [step["run"].split() for step in steps if "run" in step]
        assert commands, name
        for make, target, *_ in commands:
            assert make == "make"
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        versions = job.get("strategy", {}).get("matrix", {}).get("python")
        (setup,) = [step for step in steps if "python-version" in step.get("with", {})]
        for python in versions or [setup["with"]["python-version"]]:
            assert allowed.contains(python)


def test_an_old_python_is_refused_before_anything_is_installed(tmp_path):
    """By a stand-in for it that says its version and can do nothing else."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old"
    old.write_text(
        "#!/bin/sh\n[ $1 = -c ] || exit 9\n"
        f'exec {sys.executable} -c "import sys; sys.version_info = (3, 10, 1); $2"\n'
    )
    old.chmod(0o755)
    command = ["make", "demo", f"PYTHON={old}"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 2
    assert f"PYTHON={old} must be Python 3.11 to 3.14, not 3.10; try: " in made.stderr
    assert not (tmp_path / ".venv").exists()
