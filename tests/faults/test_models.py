"""Damaged model folders: found in the driver; weights that are not finite, on ranks."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.demo import make_config
from tests.support.models import write_model
from tests.test_config import refuse_field
from tp2d_lib import fsdp
from tp2d_lib.run import preflight

INDEX = "model.safetensors.index.json"


@pytest.fixture
def config(demo_paths, tmp_path):
    """A config of a copy of the demo model, to be damaged."""
    model = shutil.copytree(demo_paths[0], tmp_path / "model")
    return make_config((str(model), demo_paths[1]), tmp_path, 1, 1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_json(path: Path) -> None:
    path.write_text('{"model_type": ')


def no_type(path: Path) -> None:
    path.write_text(json.dumps({"hidden_size": 8}))


def narrower(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 8}))


def missing_shard(path: Path) -> None:
    path.with_name("model.safetensors").unlink()  # else no index is read
    path.write_text(json.dumps({"weight_map": {"lm_head.weight": "other.safetensors"}}))


def index_not_json(path: Path) -> None:
    path.with_name("model.safetensors").unlink()
    not_json(path)


@pytest.mark.parametrize(
    ("name", "damage", "rule"),
    [
        ("model.safetensors", cut, "undamaged model.safetensors"),
        ("model.safetensors", empty, "undamaged model.safetensors"),
        (INDEX, missing_shard, "undamaged other.safetensors (it is in the index only)"),
        (INDEX, index_not_json, f"undamaged {INDEX}"),
        ("tokenizer.json", empty, "must hold its tokenizer's files"),
        ("tokenizer.json", not_json, "must hold its tokenizer's files"),
        ("tokenizer.json", Path.unlink, "must hold its tokenizer's files"),
        ("config.json", narrower, "tensors of the sizes in its config.json, "),
        ("config.json", not_json, "must be a model directory"),
        ("config.json", no_type, "must be a model directory"),
        ("config.json", empty, "must be a model directory"),
    ],
)
def test_a_damaged_model_is_refused_in_the_driver(config, name, damage, rule):
    folder = Path(config.model_name)
    damage(folder / name)
    if damage is Path.unlink:
        (folder / "tokenizer_config.json").unlink()
    check = lambda **_: preflight.check(config, "autotp")  # noqa: E731
    refuse_field(check, "model_name", str(folder), rule)


def build(engine, config):
    """Run by every rank: what the engine says about the weights, or None."""
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    try:
        import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_weights_must_be_finite_and_all_there(demo_paths, tmp_path, pools):
    """One value in the last row: with FSDP2, the rank that holds it finds it."""
    path = Path(write_model("llama", tmp_path))
    config = make_config((str(path), demo_paths[1]), tmp_path, 2, 1, device="cpu")
    file, name = path / "model.safetensors", "model.layers.1.mlp.gate_proj.weight"
    weights = load_file(file)
    for engine in ("fsdp", "autotp"):
        assert pools(2, engine).run(build, engine, config) == [None, None]
    for value in (torch.nan, torch.inf, -torch.inf):
        damaged = {key: weight.clone() for key, weight in weights.items()}
        damaged[name][-1, -1] = value
        save_file(damaged, file, {"format": "pt"})
        sentence = f"NonFiniteError: {name!r} in {str(path)!r} must be finite, but hold"
        for engine in ("fsdp", "autotp"):
            alone = replace(config, tp_size=1, num_workers=1)
            assert pools(1, engine).run(build, engine, alone)[0].startswith(sentence)
    other, holder = pools(2, "fsdp").run(build, "fsdp", config)
    assert other is None
    assert holder.startswith(sentence)
    whole = weights.pop(name)
    for tensors, rule in (
        (weights, f"every weight of LlamaForCausalLM, but lacks {name!r}"),
        (weights | {name: whole.to(torch.int8)}, "weights in floating-point types"),
    ):
        save_file(tensors, file, {"format": "pt"})
        for engine in ("fsdp", "autotp"):
            said = pools(1, engine).run(build, engine, alone)[0]
            assert said.startswith(f"ConfigError: model_name={str(path)!r} must hold ")
            assert rule in said


def test_the_demo_itself_is_good(config):
    fsdp.check(config)
