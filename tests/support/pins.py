"""Requirements files, such as the one list of exact pins."""

from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def read_pins(path: Path = ROOT / "requirements.txt") -> dict[str, Requirement]:
    """The requirements in a file, by name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    pins = [Requirement(line) for line in lines if line]
    return {pin.name: pin for pin in pins}
