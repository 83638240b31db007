"""The figures in images/ are what their script draws, byte for byte, with alt text."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from scripts.figures import house, mesh
from scripts.make_figures import figures
from scripts.run_notebooks import PLOTS

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "images"
SVG = "{http://www.w3.org/2000/svg}"


def test_every_figure_has_its_file():
    drawn = set(figures())
    plots = {f"{tag}.svg" for tags in PLOTS.values() for tag in tags}
    assert {path.name for path in IMAGES.iterdir()} == drawn | plots


@pytest.mark.parametrize("name", figures())
def test_figure_is_what_the_script_draws(name):
    assert (IMAGES / name).read_bytes() == figures()[name].encode()


@pytest.mark.parametrize("name", figures())
def test_figure_says_what_it_shows(name):
    root = ET.fromstring(figures()[name])
    assert root.get("role") == "img"
    assert len(root.find(f"{SVG}title").text) > 10
    assert len(root.find(f"{SVG}desc").text) > 60


def test_mesh_figure_takes_its_numbers_from_the_mesh(monkeypatch):
    """Swap two ranks in the mesh, and the picture changes with it."""
    swapped = {place: 3 - rank for place, rank in mesh.RANK.items()}
    before = figures()["device_mesh.svg"]
    monkeypatch.setattr(mesh, "RANK", swapped)
    assert figures()["device_mesh.svg"] != before


def test_house_has_the_layers_that_import_linter_checks():
    """A layer of the figure may join several that follow each other."""
    layers = house.LAYERS.split("\n\n")
    drawn = [set(re.findall(r"^(\w+)", layer, re.M)) for layer in layers]
    contract = (ROOT / "pyproject.toml").read_text().split("layers = [")[1]
    lines = re.findall(r'"(.+)"', contract.split("]")[0])
    checked = [set(line.split(" | ")) for line in lines]
    for layer in drawn:
        while not layer <= checked[0]:
            checked[:2] = [checked[0] | checked[1]]
        assert layer == checked.pop(0)
    assert checked == []
