"""Execute the notebooks into build/, render them, print what each one proved.

python scripts/run_notebooks.py [-p NAME VALUE] [--write_readme] [NOTEBOOK ...]
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import time
from itertools import chain
from pathlib import Path

# So that `scripts` is found when this file is started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nbformat
import papermill
from traitlets.config import Config

from scripts import make_site
from tp2d_lib.lessons.notebook import SVG

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
SETTINGS = Config(
    {
        "KernelManager": {"transport": "ipc"},  # no open ports
        "NotebookClient": {"iopub_timeout": 300},  # its 4 s are few on a busy machine
    }
)
PLOTS = {"fsdp2_dtensor": ("resume", "traffic")}  # tags of cells, for the README


def execute(notebook: Path, build: Path, parameters: dict) -> Path:
    """Run one notebook with papermill; returns the executed copy."""
    output = build / "notebooks" / notebook.name
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(notebook),
        str(output),
        parameters={"STORAGE_PATH": str(build / "runs"), **parameters},
        cwd=str(notebook.parent),
        config=SETTINGS,
    )
    return output


def summary(executed: Path) -> str:
    """What the notebook's cell with the tag "summary" printed."""
    for cell in nbformat.read(executed, as_version=4).cells:
        if "summary" in cell.metadata.get("tags", []):
            return "".join(map(plain, cell.outputs))
    return ""


def plain(output) -> str:
    """An output's text: what was printed, or what stands for what was shown."""
    shown = output.get("data", {}).get("text/plain", "")
    return output.get("text", "") or f"{shown}\n"


def results(executed: Path) -> dict[str, str]:
    """The rows of a notebook's summary, without the speed, which differs each time."""
    lines = [line.strip() for line in summary(executed).splitlines()]
    rows = [re.split(r"  +", line, maxsplit=1) for line in lines if "  " in line]
    return {what: value for what, value in rows[2:] if "tokens/s" not in what}


def write_readme(executed: list[Path], readme: Path = ROOT / "README.md") -> bool:
    """Write the notebooks' results into the README; returns whether all are the demo's.

    One table has a column for each notebook. Their plots go beside the README.
    """
    found = {path.stem: results(path) for path in executed}
    if any(rows.get("preset") != "demo" for rows in found.values()):
        return False
    for path in executed:
        book = nbformat.read(path, as_version=4)
        for tag in PLOTS.get(path.stem, ()):
            data = [o.get("data", {}) for o in make_site.tagged(book, tag).outputs]
            [image] = [shown[SVG] for shown in data if SVG in shown]
            (readme.parent / "images" / f"{tag}.svg").write_text(image)
    python = "Python {}.{}".format(*sys.version_info)  # its documentation is the corpus
    lines = [[python, *(f"`{name}`" for name in found)], ["---"] * (1 + len(found))]
    for what in dict.fromkeys(chain.from_iterable(found.values())):
        lines.append([what, *(rows.get(what, "") for rows in found.values())])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    block = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)
    readme.write_text(block.sub(lambda _: table, readme.read_text()))
    return True


def value(text: str):
    """A parameter from the command line: a Python literal, else a string."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="all by default")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    parser.add_argument(
        "--write_readme", action="store_true", help="write the results into README.md"
    )
    parser.add_argument("--build", type=Path, default=BUILD, help="folder to write to")
    arguments = parser.parse_args()
    parameters = {name: value(text) for name, text in arguments.p}
    build = arguments.build.resolve()
    os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
    executed = []
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"), reverse=True)
    for notebook in arguments.notebooks or notebooks:  # FSDP2's first
        started = time.time()
        executed.append(execute(notebook, build, parameters))
        print(f"\n{notebook.name}, executed in {time.time() - started:.0f} s\n")
        print(summary(executed[-1]))
        print(f"Open: {executed[-1]}")
    if arguments.write_readme and not write_readme(executed):
        print("README.md is left unchanged: its figures are from the demo.")
    print("Pages:", *(f"\n  {page}" for page in make_site.write(build)), sep="")


if __name__ == "__main__":
    main()
