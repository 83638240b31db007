"""What `make template` writes obeys the gallery's rules; Anyscale's SDK reads our YAML.

The rules are those of the checks in github.com/anyscale/templates, scripts/hooks.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from scripts import make_template
from tests.support.pins import read_pins
from tp2d_lib.flags import build_parser, read_config

ROOT = Path(__file__).resolve().parents[2]
ANYSCALE = ROOT / "anyscale"
LOCK = (ANYSCALE / "python_depset.lock").read_text()
FACTS = yaml.safe_load((ANYSCALE / "gallery.yaml").read_text())
PINS = read_pins()
NAMES = ["tp2d_deepspeed_autotp", "tp2d_fsdp2_dtensor"]
each = pytest.mark.parametrize("name", NAMES)
each_config = pytest.mark.parametrize(
    "path", sorted((ANYSCALE / "configs").iterdir()), ids=lambda path: path.name
)
each_job = pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    build = tmp_path_factory.mktemp("build") / "template"
    assert make_template.make(build) == NAMES
    return build


def names_in(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))


def test_entries_have_the_gallerys_fields_and_point_at_files(template):
    entries = yaml.safe_load((template / "BUILD.yaml").read_text())
    assert [entry["name"] for entry in entries] == NAMES
    for entry in entries:
        name = entry["name"]
        assert re.fullmatch(r"[a-z0-9_-]+", name)
        assert entry.pop("owner_team") == FACTS["owner_team"]
        assert entry["test"].pop("timeout_in_sec") > 0
        assert entry == {
            "name": name,
            "dir": f"templates/{name}",
            "cluster_env": {"image_uri": FACTS["image"]},
            "compute_config": {
                "AWS": f"configs/{name}/aws.yaml",
                "GCP": f"configs/{name}/gce.yaml",
            },
            "test": {"command": "bash tests.sh", "tests_path": f"tests/{name}/"},
        }
        assert (template / entry["dir"] / "README.ipynb").is_file()
        assert (template / entry["test"]["tests_path"] / "tests.sh").is_file()
        for config in entry["compute_config"].values():
            assert (template / config).is_file()


def test_a_lock_is_recompiled_for_the_image_that_runs_it(template):
    _, python, cuda = re.fullmatch(
        r"anyscale/ray:(\d+\.\d+\.\d+)-(py\d+)-(cu\d+)", FACTS["image"]
    ).groups()
    for entry in yaml.safe_load((template / "template.depsets.yaml").read_text()):
        assert entry["output"].endswith("/python_depset.lock")
        assert entry["include_setuptools"] is True
        (seed,) = entry["pre_hooks"]
        assert f"/ray-${{RAY_VERSION}}-{python}-{cuda}.freeze.txt" in seed
        assert entry["build_arg_sets"] == [FACTS["build_arg_set"]]


@each_config
def test_the_head_only_coordinates_and_every_gpu_has_bfloat16(path):
    config = yaml.safe_load(path.read_text())
    assert config.keys() == {"head_node", "worker_nodes"}
    assert config["head_node"]["resources"] == {"CPU": 0}
    (workers,) = config["worker_nodes"]
    gpus, kind = workers["name"].split("x")
    assert (int(gpus), kind) == ((8, "H100") if "7b" in path.name else (4, "L4"))
    assert 1 <= workers["min_nodes"] <= workers["max_nodes"]


@each
def test_notebooks_are_clean_and_their_images_absolute(template, name):
    folder = template / "templates" / name
    notebook = nbformat.read(folder / "README.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
    text = (folder / "README.md").read_text()
    addresses = re.findall(r"!\[[^\]]*\]\(([^)]+)\)|<img [^>]*src=\"([^\"]+)\"", text)
    addresses = [markdown or html for markdown, html in addresses]
    assert len(addresses) >= 5
    for address in addresses:
        assert address.startswith("https://")
        if "/images/" in address:
            assert f"/{name}/images/" in address
            assert (folder / "images" / Path(address).name).is_file()
    assert text.count("**⏱️ Time to complete**: 20 min") == 1
    assert f"https://console.anyscale.com/template-preview/{name}" in text
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "../" not in prose
    assert ".ipynb)" not in prose  # the other notebook is a template of its own


def test_the_page_is_what_nbconvert_writes_byte_for_byte(template, tmp_path):
    folder = template / "templates" / NAMES[1]
    command = [sys.executable, "-m", "nbconvert", "--to", "markdown", "--output"]
    command += ["README", "--output-dir", tmp_path, folder / "README.ipynb"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert (tmp_path / "README.md").read_bytes() == (folder / "README.md").read_bytes()


def test_images_can_come_from_elsewhere(tmp_path):
    make_template.make(tmp_path / "new", images="https://example.org/figures")
    page = (tmp_path / "new" / "templates" / NAMES[0] / "README.md").read_text()
    assert "](https://example.org/figures/device_mesh.svg)" in page


@each
def test_the_lock_is_installed_here_and_on_every_node(template, name):
    folder = template / "templates" / name
    code = (folder / "README.ipynb").read_text()
    assert re.search(r"-r\s+\S*python_depset\.lock", code)
    assert code.count("launch.connect(pip=LOCK)") == 1
    assert "launch.connect()" not in code
    script = (template / "tests" / name / "tests.sh").read_text()
    assert not re.search(r"(?<!uv )\bpip\d? install", script)
    assert "papermill README.ipynb /tmp/" in script
    assert script.endswith(" --log-output --kernel python3 --cwd .\n")


def test_only_what_the_image_lacks_is_installed_at_our_own_versions():
    wanted = read_pins(ANYSCALE / "requirements.txt")
    assert "ray" not in wanted
    locked = names_in(LOCK)
    for name, pin in wanted.items():
        assert pin.specifier == PINS[name].specifier
        assert f"=={locked[name]}" == str(pin.specifier)


def test_the_lock_pins_every_package_by_hash_and_names_no_index():
    packages = re.split(r"^(?=[a-z])", LOCK, flags=re.MULTILINE)[1:]
    assert len(packages) == len(names_in(LOCK)) > 60
    assert all(" \\\n    --hash=sha256:" in package for package in packages)
    assert not re.search(r"^--|://", LOCK, re.MULTILINE)
    assert "setuptools" in names_in(LOCK)  # else pip takes one without a hash
    assert "ray" not in names_in(LOCK)


@each_job
def test_a_retried_job_resumes_its_run(engine):
    job = yaml.safe_load((ANYSCALE / f"job_{engine}.yaml").read_text())
    assert job["image_uri"] == FACTS["image"]
    assert "requirements" not in job  # it would collide with the workers' `pip`
    install, _, command = job["entrypoint"].partition(" && ")
    lock = "anyscale/python_depset.lock"
    assert re.fullmatch(rf"uv pip install -r {lock} --system --no-deps.*", install)
    python, script, *argv = command.split()
    assert (python, script) == ("python", f"train_{engine}.py")
    assert (ROOT / script).is_file()
    assert argv[-2:] == ["--pip", lock]
    assert (ROOT / lock).stat().st_size < FACTS["requirements_limit"]
    module = {"fsdp": "fsdp", "deepspeed": "autotp"}[engine]
    config = read_config(vars(build_parser(module, "").parse_args(argv[:-2])))
    assert config.num_workers == 8
    assert config.run_name == f"qwen2-7b-{engine}"
    assert config.storage_path.startswith("/mnt/cluster_storage/")
    assert job["max_retries"] >= 1


@each_job
def test_the_sdk_accepts_the_job(engine):
    from anyscale.job.models import JobConfig

    job = JobConfig.from_yaml(str(ANYSCALE / f"job_{engine}.yaml"))
    assert job.name == f"tp2d-qwen2-7b-{engine}"


@each_config
def test_the_sdk_accepts_the_nodes(path):
    from anyscale.compute_config.models import ComputeConfig

    config = ComputeConfig.from_yaml(str(path))
    assert config.head_node.resources == {"CPU": 0}
    old = {"head_node_type": {"name": "head", "instance_type": "m5.2xlarge"}}
    with pytest.raises(TypeError, match="head_node_type"):
        ComputeConfig.from_dict(old)
