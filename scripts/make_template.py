"""Write build/template/: the notebooks in the form of Anyscale's template gallery.

python scripts/make_template.py [--build DIR] [--images URL]

The folders of build/template/ go into a clone of github.com/anyscale/templates; the
entries of BUILD.yaml and template.depsets.yaml are added to its files of these names.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parents[1]
ANYSCALE = ROOT / "anyscale"
LOCK = "python_depset.lock"
FACTS = yaml.safe_load((ANYSCALE / "gallery.yaml").read_text())
MINUTES = 20
GALLERY = "https://github.com/anyscale/templates/tree/main/templates"
RAW = "https://raw.githubusercontent.com/anyscale/templates/main/templates"
HEADER = """\
<div align="left">
  <a target="_blank" href="https://console.anyscale.com/template-preview/{name}">\
<img src="https://img.shields.io/badge/Run_on-Anyscale-blue"></a>&nbsp;
  <a href="{gallery}/{name}" role="button">\
<img src="https://img.shields.io/badge/View_on-GitHub-586069?logo=github"></a>
</div>

**⏱️ Time to complete**: {minutes} min"""
PACKAGES = """\
**The packages.** Anyscale's image has Ray but not PyTorch. `python_depset.lock` names
every package that is missing, with its hash. Here they are installed for the notebook;
`launch.connect` has Ray install the same ones on every node. Elsewhere this cell does
nothing: Ray and the packages of `requirements.txt` must be there."""
INSTALL = """\
import os
import subprocess

LOCK = None
if os.path.isdir("/mnt/cluster_storage"):  # an Anyscale cluster
    LOCK = os.path.abspath("python_depset.lock")
    install = "uv pip install -r python_depset.lock --system --no-deps --no-cache-dir"
    subprocess.run(install.split(), check=True)"""
TESTS = """\
#!/usr/bin/env bash
set -euxo pipefail

uv pip install --system {papermill}
papermill README.ipynb /tmp/{name}.out.ipynb --log-output --kernel python3 --cwd .
"""


def template_name(notebook: str) -> str:
    return f"tp2d_{notebook}"


def replace_once(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"{old!r} must occur once, not {text.count(old)} times")
    return text.replace(old, new)


def convert(notebook: nbformat.NotebookNode, stem: str, images: str) -> None:
    """Change a notebook into its template: header, packages, absolute addresses."""
    name = template_name(stem)
    title, _, rest = notebook.cells[0].source.partition("\n\n")
    header = HEADER.format(name=name, gallery=GALLERY, minutes=MINUTES)
    notebook.cells[0].source = f"{title}\n\n{header}\n\n{rest}"
    setup = [cell.source.startswith("## 1 ") for cell in notebook.cells].index(True)
    notebook.cells[setup:setup] = [
        new_markdown_cell(PACKAGES, id="packages"),
        new_code_cell(INSTALL, id="install"),
    ]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../images/", f"]({images}/")
            cell.source = re.sub(
                r"\]\((\w+)\.ipynb\)",
                lambda found: f"]({GALLERY}/{template_name(found[1])})",
                cell.source,
            )
        elif "launch.connect()" in cell.source:
            cell.source = replace_once(
                cell.source, "launch.connect()", "launch.connect(pip=LOCK)"
            )


def write_template(stem: str, build: Path, images: str | None) -> None:
    """Write everything of one notebook, except its entries in the shared files."""
    name = template_name(stem)
    folder, configs = build / "templates" / name, build / "configs" / name
    tests = build / "tests" / name
    for path in (folder, configs, tests):
        path.mkdir(parents=True)
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    convert(notebook, stem, images or f"{RAW}/{name}/images")
    nbformat.write(notebook, folder / "README.ipynb")
    body, _ = MarkdownExporter().from_filename(str(folder / "README.ipynb"))
    (folder / "README.md").write_text(body)
    unwanted = shutil.ignore_patterns("__pycache__", "cli.py", "flags.py")
    for source in ("tp2d_lib", "examples"):
        shutil.copytree(ROOT / source, folder / source, ignore=unwanted)
    (folder / "images").mkdir()
    for image in re.findall(r"/images/([\w.]+)\)", body):
        shutil.copy(ROOT / "images" / image, folder / "images")
    for file in ("requirements.txt", LOCK):
        shutil.copy(ANYSCALE / file, folder)
    for cloud in ("aws.yaml", "gce.yaml"):
        shutil.copy(ANYSCALE / "configs" / cloud, configs)
    papermill = re.search(
        r"^papermill==\S+", (ROOT / "requirements.txt").read_text(), re.M
    )
    (tests / "tests.sh").write_text(TESTS.format(name=name, papermill=papermill[0]))


def build_entry(name: str) -> dict:
    """A template's entry in the gallery's BUILD.yaml."""
    return {
        "name": name,
        "owner_team": FACTS["owner_team"],
        "dir": f"templates/{name}",
        "cluster_env": {"image_uri": FACTS["image"]},
        "compute_config": {
            "AWS": f"configs/{name}/aws.yaml",
            "GCP": f"configs/{name}/gce.yaml",
        },
        "test": {
            "command": "bash tests.sh",
            "tests_path": f"tests/{name}/",
            "timeout_in_sec": 1800,
        },
    }


def depset_entry(name: str) -> dict:
    """What recompiles a lock in the gallery, against the packages of its image."""
    _, python, cuda = FACTS["image"].partition(":")[2].split("-")
    freeze = f"dependencies/images/ray-${{RAY_VERSION}}-{python}-{cuda}.freeze.txt"
    lock = f"templates/{name}/{LOCK}"
    return {
        "name": f"{name}_depset_${{RAY_VERSION}}_${{PYTHON_VERSION}}",
        "operation": "compile",
        "requirements": [f"templates/{name}/requirements.txt"],
        "output": lock,
        "include_setuptools": True,  # PyTorch requires it
        "append_flags": [
            "--python-version=${PYTHON_VERSION}",
            "--python-platform=x86_64-manylinux_2_31",
            "--unsafe-package ray",
        ],
        "build_arg_sets": [FACTS["build_arg_set"]],
        "pre_hooks": [f"scripts/depsets/seed-image-freeze.sh {freeze} {lock}"],
    }


def make(build: Path, images: str | None = None) -> list[str]:
    """Write the templates into a new folder; returns their names."""
    shutil.rmtree(build, ignore_errors=True)
    stems = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    names = [template_name(stem) for stem in stems]
    for stem in stems:
        write_template(stem, build, images)
    for file, entry in (
        ("BUILD.yaml", build_entry),
        ("template.depsets.yaml", depset_entry),
    ):
        entries = [entry(name) for name in names]
        (build / file).write_text(yaml.safe_dump(entries, sort_keys=False))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "template")
    parser.add_argument("--images", help="address of the images instead of the gallery")
    arguments = parser.parse_args()
    for name in make(arguments.build, arguments.images):
        print(arguments.build / "templates" / name)


if __name__ == "__main__":
    main()
