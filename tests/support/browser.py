"""A page in a real browser, and what is wrong with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import unquote, urldefrag

from axe_playwright_python.sync_playwright import Axe

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FOCUSABLE = "a[href], button, summary, input, [tabindex='0']"
IMAGES = """() => [...document.images].map(
  image => [image.alt, image.complete && image.naturalWidth > 0])"""
OVERFLOW = """() =>
  document.documentElement.scrollWidth - document.documentElement.clientWidth"""
# Numbers what can be reached; what lies in a closed <details> cannot.
NUMBER = f"""() => {{
  const all = [...document.querySelectorAll("{FOCUSABLE}")].filter(
    each => each.checkVisibility());
  all.forEach((each, index) => each.dataset.number = index);
  return all.length;
}}"""
FOCUSED = "() => document.activeElement.dataset.number"


def launch(playwright):
    """Chromium, as root and with little shared memory, too."""
    arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
    return playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)


def problems(browser, file: Path, width: int, scheme: str) -> list[str]:
    """What a reader of the page with this width and color scheme would meet."""
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    found, asked = [], []
    page.on("console", lambda said: found.append(said.text) if errs(said) else None)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: found.append(f"failed: {request.url}"))
    page.goto(file.as_uri())
    alts = page.evaluate(IMAGES)
    found += [f"image not shown: {alt}" for alt, loaded in alts if not loaded]
    found += [f"no alt text: {alt!r}" for alt, _ in alts if len(alt) < 20]
    if len(dict(alts)) < len(alts):
        found.append("two images share an alt text")
    if (over := page.evaluate(OVERFLOW)) > 0:
        found.append(f"wider than the window by {over} pixels")
    found += broken_links(page, file)
    found += unreachable(page)
    for rule in Axe().run(page).response["violations"]:
        if rule["impact"] in ("serious", "critical"):
            found.append(f"{rule['id']}: {rule['nodes'][0]['html'][:200]}")
    own = ("data:", file.as_uri())
    found += [f"asks for {url}" for url in asked if not url.startswith(own)]
    page.close()
    return found


def errs(message) -> bool:
    return message.type in ("error", "warning")


def broken_links(page, file: Path) -> list[str]:
    """Links to nothing in this page or beside it; other hosts are not asked."""
    links = page.eval_on_selector_all(
        "a", "all => all.map(a => a.getAttribute('href'))"
    )
    broken = []
    for link in filter(None, links):
        if link.startswith("https://"):
            continue
        address, place = urldefrag(link)
        target = file.parent / address if address else file
        known = target.is_file() and (
            not place or f'id="{unquote(place)}"' in target.read_text("utf-8")
        )
        if not known:
            broken.append(f"link to nothing: {link}")
    return broken


def unreachable(page) -> list[str]:
    """What Tab does not reach."""
    count = page.evaluate(NUMBER)
    reached = set()
    for _ in range(count + 1):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(FOCUSED))
    missing = set(map(str, range(count))) - reached
    return [f"{len(missing)} of {count} not reached by keyboard"] if missing else []
