"""The files to copy: alone, short, and equal to one process and to the engines."""

import ast
import importlib.util
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support import commands, parity, reference
from tests.support.models import write_model
from tp2d_lib import data
from tp2d_lib.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
ENGINES = {"fsdp2_2d": "fsdp", "autotp_2d": "autotp"}
each = pytest.mark.parametrize("name", ENGINES)
MAX_GRAD_NORM = 1.0
SGD = partial(torch.optim.SGD, weight_decay=0.01)


def load(name: str):
    """An example as a module, by its path alone."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@each
def test_it_is_one_short_file(name):
    file = EXAMPLES / f"{name}.py"
    source = file.read_text()
    assert len(source.splitlines()) <= 200
    imports = [node for node in ast.walk(ast.parse(source)) if "names" in node._fields]
    names = {alias.name for node in imports for alias in node.names}
    names |= {getattr(node, "module", None) or "" for node in imports}
    assert "torch" in names
    assert not any(name.startswith("tp2d") for name in names)
    command = [sys.executable, "-m", "ruff", "check", file]
    assert subprocess.run(command, check=False).returncode == 0


def some_steps(name: str, model: str, mesh: tuple, folder: str, first: int, last: int):
    """Run by every rank: losses of some steps of SGD, from what ``folder`` holds."""
    module, (dp_size, tp_size) = load(name), mesh
    config = SimpleNamespace(**module.DEFAULTS | {"model_name": model})
    config.dp_size, config.tp_size, config.learning_rate = dp_size, tp_size, 0.5
    config.batch_size_per_gpu = parity.ROWS // dp_size
    mesh = parity.the_mesh(dp_size, tp_size)
    engine = module.Engine(config, mesh, torch.device("cpu"), SGD)
    if first:
        engine.load(folder)
    batches = parity.make_steps("padded", 1)[first:last]
    shares = parity.share_of(batches, mesh, config.batch_size_per_gpu)
    losses = [engine.step(labels_of(share).numpy()) for share in shares]
    if not first:
        engine.save(folder)
    return losses


def labels_of(micro_batches: list[dict]) -> torch.Tensor:
    (micro,) = micro_batches
    return micro["labels"]


def steps_of_the_engine(engine: str, config: TrainConfig) -> list[float]:
    mesh = parity.the_mesh(config.dp_size, config.tp_size)
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    batches = parity.make_steps("padded", 1)
    shares = parity.share_of(batches, mesh, config.batch_size_per_gpu)
    return [float(built.step(share)[0]) for share in shares]


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "llama"])
@each
def test_equal_to_one_process_and_to_the_engine(name, family, pools, tmp_path):
    """Three steps on 2 x 2, with unequal rows, saved; the fourth also on 4 x 1."""
    model, folder = write_model(family, tmp_path), str(tmp_path / "state")
    steps = parity.make_steps("padded", 1)
    expected, *_ = reference.train(model, "sgd", steps, MAX_GRAD_NORM)
    ranks = pools(4, name)
    begin, *others = ranks.run(some_steps, name, model, (2, 2), folder, 0, 3)
    assert others == [begin] * 3
    mesh = (4, 1) if name == "fsdp2_2d" else (2, 2)
    end, *_ = ranks.run(some_steps, name, model, mesh, folder, 3, 4)
    config = parity.make_config(model, str(tmp_path), 2, 2, ("padded", 1, "sgd"))
    config = replace(config, max_grad_norm=MAX_GRAD_NORM)
    engines, *_ = ranks.run(steps_of_the_engine, ENGINES[name], config)
    for losses in (begin + end, engines):
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    still, *_ = reference.train(model, partial(SGD, lr=0.0), steps, MAX_GRAD_NORM)
    assert abs(expected[3] - still[3]) > 1e-3  # what was learned is in them


@pytest.mark.faults  # the lesson runs one of them, without a second start
@pytest.mark.ranks
@each
def test_the_command_resumes(name, demo_paths, tmp_path):
    """It trains on the library's rows, in its order; then on, on another mesh."""
    model, dataset = demo_paths
    config = TrainConfig(
        model_name=model,
        dataset_name=dataset,
        pack="stream",
        seq_length=64,
        cache_dir=str(tmp_path / "rows"),
    )
    config = replace(config, batch_size_per_gpu=2, max_steps=5)
    loader = data.BatchLoader(config, data.prepare(config), dp_rank=0)
    steps = [[(m["input_ids"], m["labels"]) for m in step] for step in loader]
    expected, *_ = reference.train(model, "adamw", steps, MAX_GRAD_NORM)

    command = [sys.executable, str(EXAMPLES / f"{name}.py"), f"model_name={model}"]
    command += [f"dataset={dataset}/train.jsonl", f"storage_path={tmp_path}"]
    command += ["seq_length=64", "learning_rate=1e-3"]
    first = ["tp_size=2", "batch_size_per_gpu=2", "max_steps=3"]
    again = ["dp_size=2"] if name == "fsdp2_2d" else first
    again = [*again, "max_steps=5"]
    said = ""
    for more in (first, again):
        run = commands.run([*command, *more])
        out, err = run.communicate()
        assert run.returncode == 0, err
        said += out + err
    found = re.findall(r"step (\d+) loss (\d+\.\d{6})$", said, re.MULTILINE)
    assert [int(step) for step, _ in found] == [1, 2, 3, 4, 5]
    losses = [float(loss) for _, loss in found]
    torch.testing.assert_close(losses, expected, rtol=0, atol=2e-6)


REFUSED = [
    ("llama", {"tp_size": 3}, "tp_size=3 must divide 4"),
    ("llama", {"tp_size": 2, "seq_length": 63}, "tp_size=2 must divide 63"),
    ("stablelm", {"tp_size": 2}, "tp_plan of model_name must cover model.layers.0"),
]


@pytest.mark.parametrize(("family", "settings", "sentence"), REFUSED)
@each
def test_what_cannot_be_sharded_is_refused(name, family, settings, sentence, tmp_path):
    settings["model_name"] = write_model(family, tmp_path)
    refused(name, tmp_path, settings, sentence)


def refused(name: str, folder: Path, settings: dict, sentence: str, last=3) -> None:
    module = load(name)
    config = SimpleNamespace(**module.DEFAULTS | settings)
    with pytest.raises(SystemExit, match=sentence):
        module.check(config, np.arange(last), folder)


def test_sliding_windows_are_refused_where_positions_are_sharded(tmp_path):
    settings = {"model_name": write_model("gemma3", tmp_path), "tp_size": 2}
    refused("fsdp2_2d", tmp_path, settings, "must not have sliding windows")


@each
def test_another_run_of_the_name_is_refused(name, tmp_path):
    settings = {"model_name": write_model("llama", tmp_path)}
    module = load(name)
    module.check(SimpleNamespace(**module.DEFAULTS | settings), np.arange(3), tmp_path)
    refused(name, tmp_path, settings, "try another", last=4)
    refused(name, tmp_path, settings | {"seed": 7}, "try another")


@each
def test_an_unknown_name_is_told_the_known_ones(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example", "tp=2"])
    with pytest.raises(SystemExit, match=r"'tp'.* must be some of .*tp_size"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
