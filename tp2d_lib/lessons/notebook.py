"""What a notebook needs besides training: checked parameters, tables and plots."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from tp2d_lib.config import ConfigError, closest, first_line

INJECTED = "# Parameters"  # the first line of the cell that papermill adds


def check_parameters(cells: Sequence[str]) -> None:
    """Reject a parameter the notebook does not have.

    papermill only warns about it, and the run continues without it.

    Args:
        cells: the sources run so far, IPython's ``In``.

    Raises:
        ConfigError: names the parameter, or the cell that is no Python.
    """
    own: set[str] = set()
    for source in cells:
        if not source.startswith(INJECTED):
            if "PRESET =" in source and not own:
                own = assigned(source)
            continue
        known = sorted(own) or ["PRESET"]
        for name in sorted(assigned(source) - own):
            raise ConfigError(
                f"the parameter {name} must be one of the notebook's: "
                f"{', '.join(known)}; try {closest(name, known)}"
            )


def assigned(source: str) -> set[str]:
    """Names that a cell of plain assignments sets."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"the parameters {source!r} must be assignments ({first_line(error)}); try "
            "'PRESET = \"auto\"'"
        ) from error
    return {
        target.id
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


def table(rows: Sequence[dict]) -> None:
    """Print rows that have the same keys as aligned columns."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for index, row in enumerate(cells):
        pairs = zip(row, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in pairs).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))


def show(figure, alt: str) -> None:
    """Show a plot, with its alt text."""
    from IPython.display import display  # here: notebooks only

    display(figure, metadata={"image/png": {"alt": alt}})


def tree(directory: str | Path) -> list[dict]:
    """The files below a folder with their sizes, as rows for ``table``."""
    directory = Path(directory)
    return [
        {
            "file": str(path.relative_to(directory)),
            "bytes": f"{path.stat().st_size:,}",
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]
