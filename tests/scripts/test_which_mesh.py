"""The page "Which mesh?": its rows are the planner's, and its sliders choose them."""

import json
from itertools import product
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from scripts import make_site, which_mesh
from scripts.gpu import sizes
from scripts.site import mesh, pages
from tests.support import browser

KNOWN = json.loads(which_mesh.FILE.read_text())


def speeds(model: str, length: int, ranks: int, gpu: str) -> dict[int, float]:
    """Tokens per second of a GPU by tp_size, where the mesh fits."""
    number, memory = list(KNOWN["gpus"]).index(gpu), KNOWN["gpus"][gpu]
    rows = KNOWN["rows"][f"{model}/{length}/{ranks}"]
    return {
        tp_size: length / (tp_size * seconds[number])
        for tp_size, peak, _, _, seconds in rows
        if peak <= memory
    }


def fastest(*case) -> int:
    found = speeds(*case)
    return max(found, key=found.get)


def test_every_choice_has_its_meshes():
    assert (tuple(KNOWN["models"]), tuple(KNOWN["gpus"])) == (
        which_mesh.MODELS,
        which_mesh.KINDS,
    )
    for model, length, ranks in product(
        *(KNOWN[n] for n in ("models", "lengths", "ranks"))
    ):
        found = [row[0] for row in KNOWN["rows"][f"{model}/{length}/{ranks}"]]
        heads = sizes.SHAPES[model][5]  # key-value heads
        assert found == [n for n in (1, 2, 4, 8) if n <= ranks and heads % n == 0]


def test_what_the_page_says_of_its_rows_is_so():
    held, over_dp = (
        [KNOWN["rows"][f"7b/2048/{n}"][0][at] for n in (2, 8, 64)] for at in (1, 3)
    )
    assert held == sorted(held, reverse=True)
    assert over_dp == sorted(over_dp)
    on_one_node, on_two = (max(speeds("7b", 2048, n, "H100").values()) for n in (8, 16))
    assert on_one_node > 3 * on_two
    assert fastest("7b", 2048, 16, "H100") == 4
    assert fastest("7b", 32_768, 16, "H100") == 1
    for case in product(*(KNOWN[n] for n in ("models", "lengths", "ranks")), ["L4"]):
        if found := speeds(*case):
            assert fastest(*case) == min(found)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("model", "length", "ranks"), [("0.5b", 2048, 2), ("7b", 8192, 4)]
)
def test_the_rows_are_those_of_the_dry_run(model, length, ranks, tmp_path):
    sizes.write_config(model, tmp_path)
    found = which_mesh.rows(tmp_path, model, length, ranks)
    assert found == KNOWN["rows"][f"{model}/{length}/{ranks}"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if browser.CHROMIUM is None:
        pytest.skip("the page was not opened, for want of Chromium")
    file = tmp_path_factory.mktemp("page") / "which_mesh.html"
    text = pages.page(mesh.book(), Path(), file.name, make_site.ADDRESSES, "")
    file.write_text(text, "utf-8")
    with sync_playwright() as playwright:
        started = browser.launch(playwright)
        opened = started.new_page()
        opened.goto(file.as_uri())
        yield opened
        started.close()


def test_sliders_choose_the_rows(page):
    def shown() -> list[str]:
        return page.locator(".meshes tbody th").all_inner_texts()

    assert shown() == ["tp 1 x dp 16", "tp 2 x dp 8", "tp 4 x dp 4"]
    page.get_by_label("Number of GPUs").press("Home")
    assert shown() == ["tp 1 x dp 1"]
    assert page.locator(".meshes").get_by_text("too much").count() == 1
    assert page.locator(".meshes").get_by_text("does not fit").count() == 1
    page.get_by_label("GPU", exact=True).press("End")
    assert page.locator("output").all_inner_texts()[1] == "B200"
    page.get_by_label("Number of GPUs").press("End")
    page.get_by_label("Model").press("End")
    assert shown() == ["tp 1 x dp 64", "tp 2 x dp 32", "tp 4 x dp 16", "tp 8 x dp 8"]
    best = page.locator(".meshes tr", has_text="fastest").all_inner_texts()
    assert [text.split("\t")[0].strip() for text in best] == [
        f"tp {fastest('14b', 2048, 64, 'B200')} x dp "
        f"{64 // fastest('14b', 2048, 64, 'B200')}"
    ]
