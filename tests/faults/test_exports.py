"""An export is whole or absent, and nothing older in its folder wins."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.support.demo import make_config
from tests.support.models import write_model
from tp2d_lib.model import exports

ENGINES = ("fsdp", "autotp")
OLD = ("model.safetensors", "model-00007-of-00009.safetensors")
INDEX = "model.safetensors.index.json"


def export(engine, config, folder, dies):
    """Run by every rank: what stopped the export, or None."""
    from importlib import import_module

    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    with pytest.MonkeyPatch.context() as patch:
        if dies:  # when all weights are written
            patch.setattr(exports, "copy_files", lambda *_: 1 / 0)
        try:
            built.export(folder)
        except ZeroDivisionError as error:
            return str(error)
    return None


@pytest.mark.parametrize("engine", ENGINES)
def test_an_export_is_whole_or_absent(engine, demo_paths, tmp_path, pools):
    source = write_model("llama", tmp_path)
    config = make_config((source, demo_paths[1]), tmp_path, 1, 1, device="cpu")
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    run = pools(1, engine).run
    assert run(export, engine, config, str(target), True) == ["division by zero"]
    assert not target.exists()
    (partial / "model-00003-of-00003.safetensors").touch()  # of the dead attempt
    assert run(export, engine, config, str(target), False) == [None]
    assert not partial.exists()
    assert_equal(target, source)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_export_replaces_the_one_before(engine, demo_paths, tmp_path, pools):
    source = write_model("llama", tmp_path)
    config = make_config((source, demo_paths[1]), tmp_path, 1, 1, device="cpu")
    target = tmp_path / "out"
    target.mkdir()
    for name in OLD:
        save_file({"lm_head.weight": torch.zeros(1)}, target / name, {"format": "pt"})
    (target / "README.md").write_text("mine")
    old = {path.name: path.read_bytes() for path in target.iterdir()}
    run = pools(1, engine).run
    assert run(export, engine, config, str(target), True) == ["division by zero"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == old
    assert run(export, engine, config, str(target), False) == [None]
    assert (target / "README.md").read_text() == "mine"
    assert not (target / OLD[1]).exists()
    assert_equal(target, source)


def test_the_folder_is_loadable_only_when_it_is_whole(tmp_path, monkeypatch):
    """It may be stopped at any moment of the exchange."""
    new = ("model-00001-of-00002.safetensors", INDEX, "config.json")
    seen = []

    def look(act):
        def wrapped(*args, **kwargs):
            act(*args, **kwargs)
            seen.append({path.name for path in (tmp_path / "out").iterdir()})

        return wrapped

    (tmp_path / "out").mkdir()
    (tmp_path / "new").mkdir()
    for name in OLD:
        (tmp_path / "out" / name).touch()
    for name in new:
        (tmp_path / "new" / name).touch()
    monkeypatch.setattr(exports.shutil, "move", look(exports.shutil.move))
    monkeypatch.setattr(Path, "unlink", look(Path.unlink))
    exports.publish(tmp_path / "new", tmp_path / "out")
    *before, last = seen
    assert len(before) == len(OLD) + len(new) - 1
    assert not any({OLD[0], INDEX} & names for names in before)
    assert last == {*new}


def assert_equal(folder: Path, source: str) -> None:
    got, expected = map(AutoModelForCausalLM.from_pretrained, (folder, source))
    for key, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[key], tensor), key
