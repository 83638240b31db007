"""Write library source into the notebooks' mirrored cells: sync_notebooks.py [--check]

A mirrored cell names its source in its metadata, ``{"tp2d_source": "module:a,b"}``: the
functions a and b of the module. With --check, nothing is written and any difference
is an error.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def library_source(reference: str) -> str:
    """The source text of "module:name,name", as the library has it."""
    module, names = reference.split(":")
    parts = [
        inspect.getsource(getattr(importlib.import_module(module), name)).rstrip()
        for name in names.split(",")
    ]
    return "\n\n\n".join(parts)


def sync(path: Path, check: bool) -> list[str]:
    """Bring one notebook up to date; returns the cells that differed."""
    notebook = nbformat.read(path, as_version=4)
    different = []
    for cell in notebook.cells:
        reference = cell.metadata.get("tp2d_source")
        if reference and cell.source != library_source(reference):
            different.append(reference)
            cell.source = library_source(reference)
    if different and not check:
        nbformat.write(notebook, path)
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    stale = 0
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for reference in sync(path, check):
            print(f"{path.name}: {reference} {'differs' if check else 'updated'}")
            stale += check
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
