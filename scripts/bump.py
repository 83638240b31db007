"""Try newer releases of the pins: python scripts/bump.py [--only NAME ...] [--all]

Installs them into an environment of its own, prints which pins would change, and runs
the tests there: what fails is what a bump would break. It changes no file outside
build/; raise the pins in requirements.txt after you have read the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
BUMP = ROOT / "build" / "bump"
QUICK = ["-m", "not ranks"]


def read_pins(text: str) -> dict[str, Requirement]:
    """The pinned requirements of this Python, by name."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    wanted = [Requirement(line) for line in lines if line]
    return {r.name: r for r in wanted if r.marker is None or r.marker.evaluate()}


def loosen(pins: dict[str, Requirement], only: list[str]) -> str:
    """A requirements file where ``only`` these pins, or all if empty, may be newer."""
    lines = []
    for name, pin in pins.items():
        version = str(pin.specifier).removeprefix("==")
        extras = f"[{','.join(sorted(pin.extras))}]" if pin.extras else ""
        sign = ">=" if name in (only or pins) else "=="
        lines.append(f"{name}{extras}{sign}{version}")
    return "\n".join(lines) + "\n"


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)


def install(requirements: str) -> str:
    """Create the environment; returns its Python."""
    BUMP.mkdir(parents=True, exist_ok=True)
    (BUMP / "requirements.txt").write_text(requirements)
    subprocess.run([sys.executable, "-m", "venv", "--clear", BUMP / "venv"], check=True)
    python = str(BUMP / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--requirement", BUMP / "requirements.txt"], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    return python


def changes(python: str, pins: dict[str, Requirement]) -> list[str]:
    """The pins that differ from what is installed: ``name old -> new``."""
    found = json.loads(run(python, "-m", "pip", "list", "--format", "json").stdout)
    installed = {canonicalize_name(p["name"]): p["version"] for p in found}
    lines = []
    for name, pin in pins.items():
        new = installed[canonicalize_name(name)].partition("+")[0]  # +cpu, +cu129
        if not pin.specifier.contains(new):
            lines.append(f"{name} {pin.specifier} -> {new}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="default: all pins")
    parser.add_argument(
        "--all", action="store_true", help="run every test, not just the quick ones"
    )
    options = parser.parse_args()
    pins = read_pins((ROOT / "requirements.txt").read_text())
    if unknown := set(options.only) - pins.keys():
        parser.error(f"no pin named {', '.join(unknown)}; try {', '.join(pins)}")
    python = install(loosen(pins, options.only))
    changed = changes(python, pins)
    print("\n".join(changed) or "every pin is already the newest release")
    if not changed:
        return 0
    tests = run(python, "-m", "pytest", "-q", *([] if options.all else QUICK))
    failed = [line for line in tests.stdout.splitlines() if line.startswith("FAILED")]
    print("\n".join(failed) or tests.stdout.strip().splitlines()[-1])
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
