"""Executed notebooks as pages: HTML that asks no other host, and Markdown."""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, MarkdownExporter
from nbconvert.filters import markdown2html
from traitlets.config import Config

TEMPLATE = Path(__file__).parent / "template"
HEADING = re.compile(r'<h([1-6]) id="[^"]*">(.*?)<a class="anchor-link".*?</a></h\1>')
IMAGE = re.compile(r'<img ([^>]*?)src="(?!data:)([^"]+)"([^>]*?)>')
LINK = re.compile(r'href="([\w/.-]+)\.ipynb"')
PLACE = re.compile(r'href="#([^"]+)"')  # as in Jupyter


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
    return f'<span class="wide" tabindex="0">{image}</span>'


def text(source: str, folder: Path) -> str:
    """A Markdown cell as HTML."""
    page = HEADING.sub(heading, markdown2html(source))
    page = IMAGE.sub(lambda match: inlined(match, folder), page)
    page = LINK.sub(r'href="\1.html"', page)
    page = PLACE.sub(lambda match: f'href="#{anchor(match[1])}"', page)
    page = page.replace("<pre>", '<pre tabindex="0">')
    page = page.replace("<table>", '<div class="wide" tabindex="0"><table>')
    return f'<div class="text">{page.replace("</table>", "</table></div>")}</div>'


def contents(cells: list) -> list[tuple[str, str]]:
    """Titles and addresses of the lessons."""
    found = []
    for cell in cells:
        for place, title in re.findall(
            r'<h2 id="([^"]+)"><a[^>]*>(.*?)</a></h2>', cell.metadata.get("html", "")
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
        "contents": contents(notebook.cells),
        "style": (TEMPLATE / "style.css").read_text("utf-8"),
        "script": (TEMPLATE / "page.js").read_text("utf-8"),
        "footer": footer,
    }
    body, _ = exporter.from_notebook_node(notebook, resources={"page": about})
    return body


def markdown(executed: Path, folder: Path, base: str) -> Path:
    """A notebook as Markdown with a title for docs sites; its plots lie beside it.

    Args:
        base: put before the addresses of images, such as https://example.org/docs/.
    """
    kinds = {"display_data_priority": ["image/png", "text/plain"]}  # no HTML
    exporter = MarkdownExporter(config=Config({"NbConvertBase": kinds}))
    plots = f"{executed.stem}_files"
    resources = {"output_files_dir": plots, "unique_key": executed.stem}
    notebook = nbformat.read(executed, as_version=4)
    alts = iter(alt_texts(notebook))
    body, resources = exporter.from_notebook_node(notebook, resources)
    for name, data in resources["outputs"].items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    body = re.sub(
        rf"!\[[^\]]*\]\(({plots}/[^)]+)\)",
        lambda match: f"![{next(alts)}]({base}{match[1]})",
        body,
    )
    body = body.replace("](../images/", f"]({base}images/")
    body = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", body)
    body = re.sub(r"\]\(#([^)]+)\)", lambda match: f"](#{anchor(match[1])})", body)
    title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    written = folder / f"{executed.stem}.md"
    written.write_text(f'---\ntitle: "{title}"\n---\n\n{body}', "utf-8")
    return written


def alt_texts(notebook) -> list[str]:
    """Those of the plots, in order."""
    return [
        output.metadata["image/png"]["alt"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
