"""What a stranger made is data: nothing of it runs, and a sentence says what it is."""

import builtins
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
import torch

from tests.support import autotp as deepspeed_runs
from tests.support.demo import make_config
from tests.support.evil import (
    Evil,
    spoil_item,
    spoil_metadata,
    spoil_pt,
)
from tests.support.models import write_model
from tests.support.parity import make_steps, share_of
from tests.support.rules import rules
from tp2d_lib import autotp, data
from tp2d_lib import model as models
from tp2d_lib.autotp import rules as partition_rules
from tp2d_lib.checkpoint import CheckpointError, plain
from tp2d_lib.config import ConfigError
from tp2d_lib.flags import read_config
from tp2d_lib.fsdp.files import MetadataUnpickler
from tp2d_lib.model import exports, headers
from tp2d_lib.run import cluster

SENTENCE = r"^{} must hold tensors and plain values only, but holds {}.*; load it with "
SYSTEM = "'posix.system'"


def save_new(engine, config, folder):
    """Run by every rank: a checkpoint after one step."""
    from importlib import import_module

    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    build = import_module(f"tp2d_lib.{engine}").build_engine
    new = build(config, mesh)
    new.step(share_of(make_steps("packed", 1), mesh, config.batch_size_per_gpu)[0])
    new.save(folder)


def load_each(engine, config, folders, check=True):
    """Run by every rank: what loading each of the folders says; "" if it loads."""
    from importlib import import_module

    from tp2d_lib.checkpoint import plain
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    loaded = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    original, said = plain.check, []
    if not check:  # as if a file had changed after it was checked
        plain.check = lambda *_: None
    try:
        for folder in folders:
            try:
                loaded.load(folder)
                said.append("")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
    finally:
        plain.check = original
    return said


def spoiled(whole: Path, attacks: dict, marker: Path) -> list[str]:
    """A copy of the checkpoint for each attack, and one that is sound."""
    folders = []
    for name, attack in attacks.items():
        folder = shutil.copytree(whole, whole.with_name(f"{whole.name}-{name}"))
        attack(folder, marker)
        folders.append(str(folder))
    return [*folders, str(whole)]


def test_fsdp_checkpoint_runs_nothing(demo_paths, pools, tmp_path):
    config = make_config(demo_paths, tmp_path, 2, 1)
    whole, marker = tmp_path / "whole", tmp_path / "marker"
    pools(2).run(save_new, "fsdp", config, str(whole))
    attacks = {
        "metadata": spoil_metadata,
        "value": partial(spoil_item, name="optimizer.param_groups.0.lr"),
        "tensor": partial(spoil_item, name="model.model.norm.weight"),
    }
    folders = spoiled(whole, attacks, marker)
    for said in pools(2).run(load_each, "fsdp", config, folders):
        for folder, sentence in zip(folders[:-1], said, strict=False):
            expected = SENTENCE.format(f"CheckpointError: {folder}\\S*", SYSTEM)
            assert re.search(expected, sentence)
        assert said[-1] == ""
    assert not marker.exists()


def test_deepspeed_checkpoint_runs_nothing(pools, tmp_path):
    """Neither loaded as it is nor converted, and not if it changes after the check."""
    model = write_model("llama", tmp_path)
    config = deepspeed_runs.make_config(
        model, str(tmp_path), 2, 1, 1, ("padded", 1, "adamw")
    )
    whole, marker = tmp_path / "whole", tmp_path / "marker"
    ranks = pools(2, "autotp-(2, 1)")
    ranks.run(save_new, "autotp", config, str(whole))
    old = {"_use_new_zipfile_serialization": False}
    attacks = {
        "model": partial(spoil_pt, pattern="*model_states.pt"),
        "optimizer": partial(spoil_pt, pattern="*optim_states.pt"),
        "random": partial(spoil_pt, pattern="rng-*.pt"),
        "old": partial(spoil_pt, pattern="*model_states.pt", **old),
    }
    found = {"old": "something else"}
    folders = spoiled(whole, attacks, marker)
    converted = replace(config, vocab_parallel_lm_head=False)  # another layout
    for settings in (config, converted):
        for said in ranks.run(load_each, "autotp", settings, folders):
            for folder, name, sentence in zip(folders, attacks, said, strict=False):
                path = f"CheckpointError: {folder}/\\S*.pt"
                expected = SENTENCE.format(path, found.get(name, SYSTEM))
                assert re.search(expected, sentence)
            assert said[-1] == ""
        for said in ranks.run(load_each, "autotp", settings, folders[:2], False):
            for sentence in said:
                assert f"only, but holds {SYSTEM}" in sentence
    assert not marker.exists()


def call(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls a function by its name."""
    texts = "".join(f"V{argument}\n" for argument in arguments)
    return f"c{module}\n{name}\n({texts}tR.".encode()


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("builtins", "eval", ("open('marker', 'w')",)),
        ("posix", "system", ("touch marker",)),
        ("subprocess", "getoutput", ("touch marker",)),
        ("torch", "load", ("marker",)),
        ("torch.serialization", "os.system", ("touch marker",)),
        ("torch.distributed.checkpoint.metadata", "os.system", ("touch marker",)),
    ],
)
def test_metadata_names_no_other_function(
    module, name, arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    for protocol in (b"\x80\x02", b"\x80\x04"):  # dotted names are looked up from 4 on
        file.write_bytes(protocol + call(module, name, *arguments))
        sentence = SENTENCE.format(file, f"'{module}.{name}'")
        with (
            pytest.raises(CheckpointError, match=sentence),
            plain.only(file),
            open(file, "rb") as stream,
        ):
            MetadataUnpickler(stream).load()
    assert list(tmp_path.iterdir()) == [file]


def test_metadata_of_python_3_11_2_is_read(tmp_path):
    """It calls getattr for a member of an Enum; for anything else that is refused."""
    home = "ctorch.distributed.checkpoint.metadata\n"
    get = f"cbuiltins\ngetattr\n({home}"
    file = tmp_path / "file"
    file.write_text(f"{get}_MEM_FORMAT_ENCODING\nVTORCH_CHANNELS_LAST\ntR.")
    assert MetadataUnpickler(file.open("rb")).load().value == 1
    file.write_text(f"{get}Metadata\nV__init__\ntR.")
    with pytest.raises(TypeError):
        MetadataUnpickler(file.open("rb")).load()


def test_a_pattern_that_runs_away_is_stopped(tmp_path, monkeypatch):
    model = write_model("llama", tmp_path)
    config = deepspeed_runs.make_config(
        model, str(tmp_path), 2, 1, 1, ("padded", 1, "adamw")
    )
    monkeypatch.setattr(partition_rules, "MATCH_LIMIT_S", 1)
    found = models.build_empty_model(config), set()  # what it returns, without data
    monkeypatch.setattr("tp2d_lib.run.preflight.check", lambda *_, **__: found)
    runaway = {"patterns": [r"((\w+\.?)+)+!"], "partition_type": "row"}
    with pytest.raises(ConfigError, match=r"^patterns=.* within 1 s, .*; try '\.\*o_p"):
        autotp.check(replace(config, partition_config=rules(runaway)))


CODE = "open({!r}, 'w')\nclass Custom: pass\n"


@pytest.fixture
def custom(demo_paths, tmp_path, monkeypatch):
    """The demo model's folder with code of its own, as a configuration; its marker."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(demo_paths[0], folder)
    (folder / "custom.py").write_text(CODE.format(str(marker)))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")  # transformers may ask
    yield make_config((str(folder), demo_paths[1]), tmp_path, 1, 1)
    assert not marker.exists()


def edit(config, name, **values) -> None:
    path = Path(config.model_name, name)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


AUTO = {"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.Custom"}


def test_code_of_a_known_model_is_ignored(custom):
    edit(custom, "config.json", auto_map=AUTO)
    assert type(models.build_empty_model(custom)).__module__.startswith("transformers")
    assert autotp.engine.load_full_model(custom).config.model_type == "qwen2"


def test_code_of_an_unknown_model_is_refused(custom):
    edit(custom, "config.json", auto_map=AUTO, model_type="custom")
    with pytest.raises(ConfigError, match=r"^model_name=.*contains custom code"):
        models.build_empty_model(custom)
    auto = {"AutoModelForCausalLM": "custom.Custom"}
    edit(custom, "config.json", model_type="vit", auto_map=auto)
    with pytest.raises(ValueError, match="contains custom code"):  # no decoder at all
        models.build_empty_model(custom)


def test_code_of_a_tokenizer_is_not_run(custom, tmp_path):
    auto = {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}
    edit(custom, "tokenizer_config.json", auto_map=auto, tokenizer_class="Custom")
    edit(custom, "config.json", auto_map=auto)
    data.check(custom)
    (tmp_path / "export").mkdir()
    exports.copy_files(custom, tmp_path / "export", torch.float32)
    assert (tmp_path / "export" / "tokenizer.json").exists()


def test_pickled_weights_are_refused(custom, tmp_path):
    for path in Path(custom.model_name).glob("*.safetensors"):
        path.unlink()
    bad = Path(custom.model_name, "pytorch_model.bin")
    torch.save({"weight": Evil(tmp_path / "marker")}, bad)
    for read in (headers.read, autotp.engine.load_full_model):
        with pytest.raises(ConfigError, match=r"^model_name=.* must hold safetensors"):
            read(custom)


@pytest.mark.parametrize("tag", ["apply:os.system", "new:os.system", "name:os.system"])
def test_yaml_tags_are_refused(tag, tmp_path):
    file, marker = tmp_path / "run.yaml", tmp_path / "marker"
    file.write_text(f"tp_size: !!python/object/{tag} ['touch {marker}']\n")
    with pytest.raises(ConfigError, match=r"^config=.* must be a YAML file"):
        read_config({"config": str(file)})
    assert not marker.exists()


def test_a_dataset_script_is_not_run(custom, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(CODE.format(str(tmp_path / "marker")))
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    config = replace(custom, dataset_name=str(folder))
    with suppress(ConfigError):  # of so few tokens
        data.prepare(config)
    found = data.files.open_dataset(config)
    assert [part.path for part in found.parts] == [str(folder / "train.jsonl")]
    assert found.left_out == ["rows.py"]
    assert "rows" not in sys.modules
    assert not (tmp_path / "marker").exists()


def test_prepared_rows_are_not_unpickled(custom, tmp_path):
    import numpy as np

    rows = np.array([Evil(tmp_path / "marker")], dtype=object)
    for name in ("input_ids", "lengths"):
        np.save(tmp_path / f"{name}.npy", rows, allow_pickle=True)
    with pytest.raises((ConfigError, ValueError)):
        data.check(replace(custom, prepared_data=str(tmp_path)))


def test_the_attacks_would_work(tmp_path):
    """Loaded without care, so that the tests above prove something."""
    for number, load in enumerate((pickle.loads, torch_loads)):
        marker = tmp_path / str(number)
        load(pickle.dumps(Evil(marker)) if load is pickle.loads else Evil(marker))
        assert marker.exists()


def torch_loads(value):
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


STRANGER = """
import ray, sys
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("ran", ray.get(ray.remote(lambda: 1).remote()))
"""


@pytest.mark.faults
def test_a_cluster_of_ours_asks_for_its_token():
    """Of processes on this machine, too; a control shows that the way in works."""
    cluster.connect()
    try:
        assert cluster.own
        assert (Path.home() / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
        address = ray.get_runtime_context().gcs_address
        said = []
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        for token in ({}, {"RAY_AUTH_TOKEN": "0" * 64}, None):
            mode = {"RAY_AUTH_MODE": "token" if token != {} else "disabled"}
            done = subprocess.run(
                [sys.executable, "-c", STRANGER, address],
                env={**kept, **mode, **(token or {})},
                capture_output=True,
                text=True,
            )
            said.append((done.stdout, "InvalidAuthToken" in done.stderr))
        assert said == [("", True), ("", True), ("ran 1\n", False)]
    finally:
        ray.shutdown()
