"""The figures in images/ are what their script draws, byte for byte, with alt text."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from scripts.make_figures import figures

IMAGES = Path(__file__).resolve().parents[2] / "images"
SVG = "{http://www.w3.org/2000/svg}"


def test_every_figure_has_its_file():
    assert {path.name for path in IMAGES.iterdir()} == set(figures())


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
    from scripts import make_figures

    swapped = {place: 3 - rank for place, rank in make_figures.RANK.items()}
    before = make_figures.figures()["device_mesh.svg"]
    monkeypatch.setattr(make_figures, "RANK", swapped)
    assert make_figures.figures()["device_mesh.svg"] != before
