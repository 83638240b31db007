"""What a notebook needs besides training: checked parameters, tables and plots."""

from __future__ import annotations

import ast
import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tp2d_lib.config import ConfigError, closest, first_line
from tp2d_lib.cost.dryrun import aligned, as_cells

NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]\d+)?( ?%| [kMGT]?B| s)?")
INJECTED = "# Parameters"  # the first line of the cell that papermill adds
SVG = "image/svg+xml"


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


def table(rows: Sequence[dict], formats: dict[str, str] | None = None) -> None:
    """Show rows that have the same keys: as text, and on a page as a table.

    Args:
        formats: how a column's numbers are written, such as ``{"loss": ".6f"}``; whole
            numbers have commas if nothing else is said.
    """
    from IPython.display import display  # here, as below: notebooks only

    formats = formats or {}
    shown = [{k: as_text(v, formats.get(k)) for k, v in row.items()} for row in rows]
    cells = as_cells(shown)
    display({"text/plain": aligned(cells), "text/html": html_table(cells)}, raw=True)


def as_text(value: object, spec: str | None) -> str:
    if type(value) is int:
        return format(value, spec or ",")
    return format(value, spec) if spec and isinstance(value, float) else str(value)


def html_table(cells: list[list[str]]) -> str:
    """A table whose columns of numbers are of the class "number"."""
    titles, *rows = cells
    columns = zip(*rows, strict=True)
    kinds = [" class=number" * all(map(NUMBER.fullmatch, each)) for each in columns]

    def row(cells: list[str], tag: str, more: str = "") -> str:
        each = zip(cells, kinds, strict=True)
        return "".join(f"<{tag}{more}{k}>{escape(cell)}</{tag}>" for cell, k in each)

    body = "".join(f"<tr>{row(each, 'td')}</tr>" for each in rows)
    head = row(titles, "th", " scope=col")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def answer(given: float | None, right: float) -> None:
    """Say whether the answer to an exercise is right, to one percent."""
    if given is None:
        print("no answer yet: replace None with your number")
    elif math.isclose(given, right, rel_tol=0.01):
        print("right")
    else:
        print(f"not {given}: try again, or open the answer")


def show(figure, alt: str) -> None:
    """Show a plot as SVG, sharp on any screen, with its alt text."""
    from IPython.display import display
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context({"svg.hashsalt": alt}):  # the same file each time
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    data = {SVG: drawn.getvalue(), "text/plain": f"plot: {alt}"}
    display(data, metadata={SVG: {"alt": alt}}, raw=True)


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
