"""What a notebook needs besides training: its parameters checked, its answers shown."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from pathlib import Path

from tp2d_lib.config import ConfigError, closest

INJECTED = "# Parameters"  # the first line of the cell that papermill adds


def check_parameters(cells: Sequence[str]) -> None:
    """Reject a parameter the notebook does not have.

    papermill only warns about one, and the run goes on without it.

    Args:
        cells: the sources run so far, IPython's ``In``.
    """
    own: set[str] = set()
    for source in cells:
        if not source.startswith(INJECTED):
            if "PRESET =" in source and not own:
                own = assigned(source)
            continue
        for name in sorted(assigned(source) - own):
            raise ConfigError(
                f"the parameter {name} must be one of the notebook's: "
                f"{', '.join(sorted(own))}; try {closest(name, sorted(own))}"
            )


def assigned(source: str) -> set[str]:
    """Names that a cell of plain assignments sets."""
    return {
        target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


def table(rows: Sequence[dict]) -> None:
    """Print rows of equal keys as aligned columns."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for index, row in enumerate(cells):
        pairs = zip(row, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in pairs).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))


def show_source(function) -> None:
    """Show a function of the library as highlighted code."""
    from IPython.display import Markdown, display

    display(Markdown(f"```python\n{inspect.getsource(function)}```"))


def tree(directory: str | Path) -> list[dict]:
    """The files below a folder with their sizes, as rows for ``table``."""
    directory = Path(directory)
    return [
        {
            "file": str(path.relative_to(directory)),
            "KiB": f"{path.stat().st_size / 1024:,.0f}",
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]
