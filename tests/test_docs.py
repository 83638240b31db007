"""What we publish points at what exists, and quotes what libraries say.

``make links`` asks every address on the network, and writes the day into links.txt.
"""

import datetime
import mmap
import re
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
LINKS = Path(__file__).parent / "links.txt"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
OVERVIEW = ROOT / "scripts" / "site" / "index.md"  # links to pages that are built
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE = [*ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py")]
CODE += sorted((ROOT / "tp2d_lib").rglob("*.py"))
ADDRESS = re.compile(r"https?://[^\s)\"'`<>{}\\]+")
EXAMPLE = re.compile(
    r"https?://([\w.-]+\.)?(example\.org|localhost|127\.0\.0\.1|HOST)\b"
)


def text_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n\n".join(c.source for c in nbformat.read(path, as_version=4).cells)


def published() -> dict[str, Path]:
    """Every address that we publish, and one of the files that have it."""
    found = {}
    for path in [*PAGES, OVERVIEW, *NOTEBOOKS, *CODE]:
        for address in ADDRESS.findall(text_of(path)):
            if not EXAMPLE.match(address):
                found[address.rstrip(".,;:")] = path
    return found


def listed() -> set[str]:
    lines = LINKS.read_text().splitlines()
    return {line.split()[1] for line in lines if not line.startswith("#")}


def test_every_address_is_listed_and_nothing_else():
    """A new one is looked at once, by whoever adds it; `make links` looks again."""
    assert listed() == set(published()), "add it to tests/links.txt, with the day"


@pytest.mark.online
def test_every_address_is_alive():
    today, dead, lines = datetime.date.today().isoformat(), [], []
    for address in sorted(published()):
        request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0"})
        try:
            urllib.request.urlopen(request, timeout=30).close()
            lines.append(f"{today} {address}\n")
        except (urllib.error.URLError, TimeoutError) as error:
            dead.append(f"{address}: {error}")
    assert not dead
    heading = [line for line in LINKS.open() if line.startswith("#")]
    LINKS.write_text("".join(heading[:1] + lines))


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", h.lower()) for h in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda path: path.stem)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?://|attachment:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), target


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def quotes() -> list[tuple[str, str]]:
    """The texts in docs/troubleshooting.md, and which package has each."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    theirs, ours = page.split("## From tp2d")
    found = re.findall(r"^\| `([^`]+)` \| (\w+) \|", theirs, re.MULTILINE)
    found += [(q, "tp2d_lib") for q in re.findall(r"^\| `([^`]+)` \|", ours, re.M)]
    assert len(found) >= 14
    return found


@pytest.mark.parametrize(("quote", "package"), quotes())
def test_an_error_that_is_explained_still_has_these_words(quote, package):
    folder = Path(find_spec(package).submodule_search_locations[0])
    for path in folder.rglob("*.py"):
        if quote in path.read_text(errors="replace"):
            return
    for path in (folder / "lib").glob("libtorch_cpu.*"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=1) as content:
            assert content.find(quote.encode()) > 0
            return
    raise AssertionError(f"{package} does not say it any more")
