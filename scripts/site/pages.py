"""Executed notebooks as pages: HTML that asks no other host, and Markdown."""

from __future__ import annotations

import ast
import base64
import html
import mimetypes
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, MarkdownExporter
from nbconvert.filters import markdown2html, strip_ansi
from traitlets.config import Config

from tp2d_lib.lessons.notebook import INJECTED, SVG

TEMPLATE = Path(__file__).parent / "template"
HEADING = re.compile(r'<h([1-6]) id="[^"]*">(.*?)<a class="anchor-link".*?</a></h\1>')
IMAGE = re.compile(r'<img ([^>]*?)src="(?!data:)([^"]+)"([^>]*?)>')
LINK = re.compile(r'href="([\w/.-]+)\.ipynb"')
RAYLET = re.compile(r"^(\(raylet\) .*?\.) .*", re.MULTILINE)  # ids come after it
PLACE = re.compile(r'href="#([^"]+)"')  # as in Jupyter


def cleaned(executed: Path) -> nbformat.NotebookNode:
    """An executed notebook without papermill's cell, our folders, and Ray's ids."""
    notebook = nbformat.read(executed, as_version=4)
    notebook.cells = [c for c in notebook.cells if not c.source.startswith(INJECTED)]
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    runs = given.get("STORAGE_PATH")

    def clean(printed: str) -> str:
        printed = RAYLET.sub(r"\1 [...]", strip_ansi(printed))
        return (printed.replace(runs, "RUNS") if runs else printed).rstrip() + "\n"

    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = clean(output.text)
            elif "text/plain" in output.get("data", {}):
                output.data["text/plain"] = clean(output.data["text/plain"])
    return notebook


def summary(cell: nbformat.NotebookNode) -> str:
    """A line in the place of code that a reader can do without, if it is such.

    That is a cell of imports, or one that mirrors the library outside its lessons.
    """
    mirrored = cell.metadata.get("tp2d_source", "tp2d_lib.lessons")
    if not mirrored.startswith("tp2d_lib.lessons"):
        module, names = mirrored.split(":")
        return f"Library source: {names.replace(',', ', ')}, from {module}"
    try:
        body = ast.parse(cell.source).body
    except SyntaxError:  # of IPython's own
        return ""
    only = body and all(isinstance(each, ast.Import | ast.ImportFrom) for each in body)
    return "Imports" if only else ""


def anchor(title: str) -> str:
    """A heading's address, which outlives a change of its number."""
    words = re.sub(r"^\d+\s*·\s*", "", html.unescape(re.sub(r"<[^>]+>", "", title)))
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def heading(match: re.Match) -> str:
    level, title = match.groups()
    place = anchor(title)
    if level == "1":
        return f'<h1 id="{place}">{title}</h1>'
    return f'<h{level} id="{place}"><a href="#{place}">{title}</a></h{level}>'


def inlined(match: re.Match, folder: Path) -> str:
    """An image of the repository, within the page, in a box of its own to scroll."""
    before, source, after = match.groups()
    file = folder / source
    kind = mimetypes.guess_type(file.name)[0]
    data = base64.b64encode(file.read_bytes()).decode()
    address = f"data:{kind};base64,{data}"
    image = f'<img {before}src="{address}"{after}>'
    return f'<span class="wide {file.stem}" tabindex="0">{image}</span>'


def text(source: str, folder: Path) -> str:
    """A Markdown cell as HTML."""
    page = HEADING.sub(heading, markdown2html(source))
    page = IMAGE.sub(lambda match: inlined(match, folder), page)
    page = LINK.sub(r'href="\1.html"', page)
    page = PLACE.sub(lambda match: f'href="#{anchor(match[1])}"', page)
    page = page.replace("<pre>", '<pre tabindex="0">')
    page = page.replace("<p><strong>Question", '<p class="question"><strong>Question')
    page = page.replace("<table>", '<div class="wide" tabindex="0"><table>')
    return f'<div class="text">{page.replace("</table>", "</table></div>")}</div>'


def contents(cells: list) -> list[tuple[str, str]]:
    """Titles and addresses of the lessons, and of what follows them."""
    found = []
    for cell in cells:
        for place, title in re.findall(
            r'<h[23] id="([^"]+)"><a[^>]*>(.*?)</a></h', cell.metadata.get("html", "")
        ):
            found.append((html.unescape(re.sub(r"<[^>]+>", "", title)), place))
    return found


def page(notebook, folder: Path, address: str, pages: dict[str, str], footer: str):
    """A notebook as one HTML file.

    Args:
        notebook: executed; images are looked up from ``folder``, where it lies.
        address: of this page, one of those in ``pages``, by their names.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.metadata["html"] = text(cell.source, folder)
        elif cell.cell_type == "code":
            cell.metadata["summary"] = summary(cell)
    first = notebook.cells[0].source
    title, _, rest = first.removeprefix("# ").partition("\n")
    sentence = re.split(r"(?<=[.:])\s", re.sub(r"[*`]", "", rest.strip()))[0]
    exporter = HTMLExporter(
        template_name="template", extra_template_basedirs=[str(TEMPLATE.parent)]
    )
    about = {
        "title": title,
        "description": sentence,
        "address": address,
        "pages": pages,
        "next": following(address, pages),
        "contents": contents(notebook.cells),
        "style": (TEMPLATE / "style.css").read_text("utf-8"),
        "script": "".join(
            (TEMPLATE / name).read_text("utf-8") for name in ("page.js", "mesh.js")
        ),
        "footer": footer,
    }
    body, _ = exporter.from_notebook_node(notebook, resources={"page": about})
    return body


def following(address: str, pages: dict[str, str]) -> tuple[str, str] | None:
    """The name and address of the page after this one, if there is one."""
    names = list(pages)
    after = names[list(pages.values()).index(address) + 1 :]
    return (after[0], pages[after[0]]) if after else None


def markdown(notebook, file: Path, base: str) -> Path:
    """Write a notebook as Markdown for docs sites; its plots lie beside it.

    Args:
        base: put before the addresses of images, such as https://example.org/docs/.
    """
    kinds = {"display_data_priority": [SVG, "text/plain"]}  # no HTML
    exporter = MarkdownExporter(config=Config({"NbConvertBase": kinds}))
    folder, plots = file.parent, f"{file.stem}_files"
    resources = {"output_files_dir": plots, "unique_key": file.stem}
    alts = iter(alt_texts(notebook))
    body, resources = exporter.from_notebook_node(notebook, resources)
    for name, data in resources["outputs"].items():
        plot = folder / name
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(data)
    body = re.sub(
        rf"!\[[^\]]*\]\(({plots}/[^)]+)\)",
        lambda match: f"![{next(alts)}]({base}{match[1]})",
        body,
    )
    body = body.replace("](../images/", f"]({base}images/")
    body = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", body)
    body = re.sub(r"\]\(#([^)]+)\)", lambda match: f"](#{anchor(match[1])})", body)
    title, _, rest = body.lstrip().removeprefix("# ").partition("\n")
    file.write_text(f'---\ntitle: "{title}"\n---\n{rest}', "utf-8")
    return file


def alt_texts(notebook) -> list[str]:
    """Those of the plots, in order."""
    return [
        output.metadata[SVG]["alt"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if SVG in output.get("data", {})
    ]
