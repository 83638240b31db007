"""Write build/site: an index and a page for each executed notebook.

python scripts/make_site.py [--build FOLDER] [--image_base_url URL]

HTML that asks no other host, each page in one file, and the same as Markdown for a docs
site. `make demo` executes the notebooks and does this too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

# So that `scripts` is found when this file is started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nbformat import NotebookNode, v4

from scripts.site import mesh, pages

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
INDEX = ROOT / "scripts" / "site" / "index.md"
ADDRESSES = {  # of the pages, by their names
    "Overview": "index.html",
    "FSDP2": "fsdp2_dtensor.html",
    "AutoTP": "deepspeed_autotp.html",
    "Which mesh?": "which_mesh.html",
}
OUTPUT = re.compile(r"<!-- output (\w+) (\w+) -->\n")


def write(build: Path = BUILD, image_base_url: str = "") -> list[Path]:
    """The pages of the executed notebooks in ``build/notebooks``, and an index.

    Without one of the notebooks, neither it nor the index is written.
    """
    site = build / "site"
    site.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "images", site / "markdown" / "images", dirs_exist_ok=True)
    executed = {file.stem: file for file in (build / "notebooks").glob("*.ipynb")}
    known = [Path(address).stem for address in list(ADDRESSES.values())[1:3]]
    books = {n: pages.cleaned(executed[n]) for n in known if n in executed}
    footers = {name: footer(book) for name, book in books.items()}
    written = [
        pages.markdown(book, site / "markdown" / f"{name}.md", image_base_url)
        for name, book in books.items()
    ]
    if len(books) == len(known):
        books["index"] = index(books)
        footers["index"] = footers[known[0]]
        books["which_mesh"] = mesh.book()
        footers["which_mesh"] = "rows computed by scripts/which_mesh.py"
    shown = {n: a for n, a in ADDRESSES.items() if Path(a).stem in books}
    for name, book in books.items():
        file = site / f"{name}.html"
        folder = ROOT / "notebooks"  # the images are where they were written for
        text = pages.page(book, folder, file.name, shown, footers[name])
        file.write_text(text, "utf-8")
        written.append(file)
    return written


def index(books: dict) -> NotebookNode:
    """The index's text, with outputs of cells that have a tag."""
    parts = OUTPUT.split(INDEX.read_text("utf-8"))
    cells = [v4.new_markdown_cell(parts[0])]
    for book, tag, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        outputs = tagged(books[book], tag).outputs
        cells += [v4.new_code_cell(outputs=outputs), v4.new_markdown_cell(text)]
    return v4.new_notebook(cells=cells)


def tagged(book, tag: str) -> NotebookNode:
    return next(c for c in book.cells if tag in c.metadata.get("tags", ()))


def footer(book) -> str:
    """What was executed where, and when."""
    texts = [
        output.get("text", "")
        for cell in book.cells
        for output in cell.get("outputs", ())
    ]
    told = "\n".join(texts)
    versions = re.search(r"^.*PyTorch \S+.*$", told, re.MULTILINE)
    preset = re.search(r"^preset: (.*)$", told, re.MULTILINE)
    cluster = re.search(r"^.*node\(s\).*$", told, re.MULTILINE)
    date = book.metadata.get("papermill", {}).get("end_time", "")[:10]
    facts = [found[0] for found in (preset, versions, cluster) if found]
    return " · ".join([*dict.fromkeys(facts), f"executed {date}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=BUILD, help="holds notebooks/")
    parser.add_argument(
        "--image_base_url", default="", help="before the images' addresses in Markdown"
    )
    options = parser.parse_args()
    if not list((options.build / "notebooks").glob("*.ipynb")):
        parser.error(
            f"{options.build}/notebooks has no executed notebook; try make demo"
        )
    for file in write(options.build, options.image_base_url):
        print(file)


if __name__ == "__main__":
    main()
