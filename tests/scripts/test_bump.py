"""Which pins `make bump` loosens."""

from pathlib import Path

from scripts import bump

ROOT = Path(__file__).resolve().parents[2]


def test_the_projects_pins_are_read_for_this_python():
    pins = bump.read_pins((ROOT / "requirements.txt").read_text())
    assert {"torch", "ray", "deepspeed", "transformers", "pytest"} <= pins.keys()
    assert all(str(pin.specifier).startswith("==") for pin in pins.values())


def test_only_some_are_loosened():
    pins = bump.read_pins("a==1.0  # why\nb[x,y]==2.0\nc==3; python_version < '3'\n")
    assert bump.loosen(pins, ["b"]) == "a==1.0\nb[x,y]>=2.0\n"
    assert bump.loosen(pins, []) == "a>=1.0\nb[x,y]>=2.0\n"
