"""An export is read as its source is: the same files, but for what training changed."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.demo import make_config
from tests.support.models import write_model
from tests.test_config import refuse_field
from tp2d_lib import autotp
from tp2d_lib.model import exports

ENGINES = ("fsdp", "autotp")
NOTE = "; the float32 master weights were rounded to bfloat16"


def write_older(folder, kind="qwen2-tied", dtype=torch.float32):
    """A model whose config.json has the form of transformers 4, in another layout."""
    path = Path(write_model(kind, folder, dtype, initializer_range=0.2))
    content = json.loads((path / "config.json").read_text())
    del content["dtype"], content["rope_parameters"], content["transformers_version"]
    content |= {"rope_theta": 1000000, "torch_dtype": str(dtype)[6:], "_own": "é"}
    (path / "config.json").write_text(json.dumps(content, indent=7), "utf-8")
    (path / "model.safetensors.index.json").write_text("an index of no use")
    return path


@pytest.fixture
def source(demo_paths, tmp_path):
    path = write_older(tmp_path)
    for file in Path(demo_paths[0]).glob("tokenizer*"):
        shutil.copy(file, path)
    (path / "generation_config.json").write_text('{"temperature": 0.5}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def export(engine, config):
    """Run by every rank: what the engine says about its export."""
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    return built.export(config.export_to)


def exported(engine, config, pools):
    """The folder of an export, by one rank, and what the engine says about it."""
    said = pools(1, engine).run(export, engine, config)
    return Path(config.export_to), said[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_files_are_copied_byte_for_byte(engine, source, demo_paths, tmp_path, pools):
    paths, target = (str(source), demo_paths[1]), str(tmp_path / "out")
    config = make_config(paths, tmp_path, 1, 1, device="cpu", export_to=target)
    folder, said = exported(engine, config, pools)
    assert said == f"exported to {target} in float32"
    kept = {path.name: path.read_bytes() for path in source.glob("*")}
    del kept["model.safetensors.index.json"]
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.keys() == kept.keys()
    weights = "model.safetensors"
    expected, got = (load_file(place / weights) for place in (source, folder))
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    del kept[weights], found[weights]
    assert found == kept


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_have_the_type_asked_for(engine, source, demo_paths, tmp_path, pools):
    paths, target = (str(source), demo_paths[1]), str(tmp_path / "out")
    config = make_config(paths, tmp_path, 1, 1, device="cpu", export_to=target)
    config = replace(config, export_dtype="bfloat16")
    folder, said = exported(engine, config, pools)
    assert said == f"exported to {target} in bfloat16{NOTE}"
    tensors = load_file(folder / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    before, after = (
        json.loads((place / "config.json").read_text()) for place in (source, folder)
    )
    assert after == before | {"torch_dtype": "bfloat16"}
    assert list(after) == list(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_type_is_that_of_the_files(engine, demo_paths, tmp_path, pools):
    """Whatever config.json says; names are those in the files, too."""
    path = write_model("gpt-neox", tmp_path, dtype=torch.bfloat16)
    file = Path(path, "config.json")
    text = file.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"')
    file.write_text(text)
    target = str(tmp_path / "out")
    paths = (path, demo_paths[1])
    config = make_config(paths, tmp_path, 1, 1, device="cpu", export_to=target)
    folder, said = exported(engine, config, pools)
    assert said == f"exported to {target} in bfloat16{NOTE}"
    assert (folder / "config.json").read_text() == text
    expected, got = (load_file(Path(p, "model.safetensors")) for p in (path, folder))
    assert {k: t.dtype for k, t in got.items()} == {
        k: t.dtype for k, t in expected.items()
    }


def test_deepspeed_has_no_float32_to_export(demo_paths, tmp_path):
    settings = {"dtype": "bfloat16", "device": "cpu", "export_dtype": "float32"}
    config = make_config(demo_paths, tmp_path, 1, 1, **settings)
    check = lambda **_: autotp.check(config)  # noqa: E731
    refuse_field(check, "export_dtype", "float32", "cannot be combined with torch.bf")


def test_two_exports_to_a_store_share_no_folder(demo_paths, tmp_path):
    config = make_config(demo_paths, tmp_path, 1, 1)
    one, other, again = (
        exports.partial_folder(exports.store.path(f"s3://b/{run}/model"), config)
        for run in ("run-1", "run-2", "run-1")
    )
    assert one == again != other
    assert one.parent == config.data_dir
