"""A checkpoint that was damaged is named and refused; one of another run, too."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.damage import DAMAGES, flip, truncate
from tests.support.demo import make_config
from tp2d_lib import checkpoint, data
from tp2d_lib.checkpoint import manifest, resume, storage
from tp2d_lib.config import ConfigError


def write_checkpoint(config, step, engine="fsdp"):
    """A checkpoint's files, as commit writes them, but with weights of 25 kB."""
    partial = manifest.partial_folder(config, step)
    partial.mkdir(parents=True)
    (partial / "weights.bin").write_bytes(bytes(range(256)) * 100)
    (partial / manifest.STATE_FILE).write_text(json.dumps({"step": step}))
    about = {"step": step, "position": 8 * step, **resume.about(engine, config)}
    return manifest.publish(partial, {}, about)


@pytest.fixture(scope="module")
def prepared(demo_paths, tmp_path_factory):
    config = make_config(demo_paths, tmp_path_factory.mktemp("data"), 1, 1)
    return replace(config, prepared_data=str(data.prepare(config)))


@pytest.fixture
def config(prepared, tmp_path):
    return replace(prepared, storage_path=str(tmp_path), run_name="run")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["weights.bin", manifest.STATE_FILE, "manifest.json"])
def test_damaged_checkpoint_is_refused(name, damage, config):
    folder = write_checkpoint(config, 3)
    checkpoint.verify(folder)
    DAMAGES[damage](folder / name)
    with pytest.raises(checkpoint.CheckpointError, match=f"{folder}.*(must|has)"):
        checkpoint.verify(folder)


def test_the_newest_whole_one_is_the_last(config):
    folders = [write_checkpoint(config, step) for step in (1, 2, 3)]
    assert checkpoint.last_of(config) == str(folders[2])
    truncate(folders[2] / "weights.bin")
    assert checkpoint.last_of(config) == str(folders[1])
    (folders[1] / "manifest.json").unlink()
    assert checkpoint.start_of(config) == str(folders[0])
    (folders[0] / "weights.bin").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"but .*checkpoint-000003"):
        checkpoint.start_of(config)


def test_a_damaged_one_is_replaced_and_good_ones_are_kept(config):
    config = replace(config, save_total_limit=2)
    folders = [write_checkpoint(config, step) for step in (2, 4, 6)]
    for folder in folders[1:]:
        flip(folder / "weights.bin")
    write_checkpoint(config, 3)  # the run went back to step 2
    manifest.prune(config, 3)
    names = ["000006", "000004", "000003", "000002"]
    assert [path.name[-6:] for path in manifest.checkpoints(config)] == names
    checkpoint.verify(write_checkpoint(config, 4))
    manifest.prune(config, 4)
    assert [path.name[-6:] for path in manifest.checkpoints(config)] == names[:3]


def test_leftovers_of_a_dead_attempt_are_removed(config):
    whole = write_checkpoint(config, 2)
    torn = manifest.partial_folder(config, 4)
    torn.mkdir()
    (torn / "weights.bin").touch()
    assert checkpoint.last_of(config) == str(whole)
    manifest.remove_leftovers(config)
    assert list(manifest.run_folder(config).iterdir()) == [whole]


def test_what_cannot_be_deleted_is_told_once_and_tried_again(config, monkeypatch):
    """As a file that is immutable, or on NFS open in another process."""
    unlink, said = os.unlink, []

    def refuses(path, **options):
        if str(path).endswith("weights.bin"):
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        unlink(path, **options)

    def steps():
        return [manifest.step_of(folder) for folder in manifest.checkpoints(config)]

    config, run = replace(config, save_total_limit=1), manifest.run_folder(config)
    torn = manifest.partial_folder(config, 8)
    copy = run / f"{manifest.CONVERTED}2"
    for folder in (torn, copy):
        folder.mkdir(parents=True)
        (folder / "weights.bin").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuses)
        for _ in range(2):
            manifest.remove_leftovers(config, said.append)
        assert not torn.exists()  # its name is free: nothing joins the next checkpoint
        for step in (2, 4, 6):
            write_checkpoint(config, step)
            manifest.prune(config, step, said.append)
            assert steps() == [step]
        assert not copy.exists()
        flip(write_checkpoint(config, 7) / "weights.bin")
        write_checkpoint(config, 7)  # in place of the damaged one
        manifest.prune(config, 7, said.append)
    checkpoint.verify(run / "checkpoint-000007")
    because = r"cannot be deleted yet \(\[Errno 1\] Operation not permitted: .*\)"
    names = ["08.partial", "ed-2", "02", "04", "06", "07"]
    for text, name in zip(said, names, strict=True):
        assert re.fullmatch(rf"{run}/.*{name}\.old-\w+\.partial {because}", text)
    left = [path for path in run.rglob("*") if path.is_file()]
    aside = [path for path in left if manifest.OLD in path.parent.name]
    assert {path.name for path in aside} == {"weights.bin"}  # all else is gone
    assert len(aside) == 6
    write_checkpoint(config, 9)
    manifest.prune(config, 9, said.append)
    assert [path.name for path in run.iterdir()] == ["checkpoint-000009"]


def test_another_run_is_refused_and_changes_are_told(config, demo_paths):
    """A position counts rows: other rows or another seed would go on silently wrong."""
    assert resume.check(config) is None
    write_checkpoint(config, 3)
    stored = resume.check(config)
    assert (stored["step"], resume.changes(stored, config)) == (3, "")
    changed = replace(config, learning_rate=0.5, dp_size=2, num_workers=2)
    assert resume.changes(stored, changed) == (
        "changed since step 3: dp_size 1 -> 2, learning_rate 0.01 -> 0.5"
    )
    with pytest.raises(ConfigError, match=r"run_name='run' must resume with the engin"):
        resume.check_engine("autotp", config)
    longer = replace(config, prepared_data=None, seq_length=128)
    fewer = replace(config, prepared_data=None, dataset_percentage=50)
    for other in (
        replace(config, seed=7),
        replace(config, optimizer="sgd"),
        replace(longer, prepared_data=str(data.prepare(longer))),
        replace(fewer, prepared_data=str(data.prepare(fewer))),
    ):
        with pytest.raises(ConfigError, match="try another run_name"):
            resume.check(other)


def test_rows_are_told_by_what_they_hold(config, tmp_path):
    """Not by their folder, which a copy has not; also those of the user's own."""
    write_checkpoint(config, 3)
    copy = Path(shutil.copytree(config.prepared_data, tmp_path / "a" / "rows"))
    resume.check(replace(config, prepared_data=str(copy)))
    own = shutil.copytree(copy, tmp_path / "b" / "rows")
    (own / "rows.json").unlink()
    resume.check(replace(config, prepared_data=str(own)))
    ids = np.load(own / "input_ids.npy")
    np.save(own / "input_ids.npy", ids[::-1])
    with pytest.raises(ConfigError, match="other rows"):
        resume.check(replace(config, prepared_data=str(own)))


def test_versions_are_those_of_what_is_installed(monkeypatch):
    """FSDP2 trains without DeepSpeed."""
    before = resume.versions()
    assert before.keys() == {"torch", "transformers", "deepspeed"}
    monkeypatch.setattr(resume, "LIBRARIES", ("torch", "not-deepspeed"))
    assert resume.versions() == {"torch": before["torch"]}


def test_another_model_of_the_same_shape_is_refused(config, tmp_path):
    write_checkpoint(config, 3)
    copy = shutil.copytree(config.model_name, tmp_path / "copy")
    moved = replace(config, model_name=str(copy))
    assert resume.check(moved)
    flip(copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model_name=.* must be what .* another mod"):
        resume.check(moved)


def test_adapters_go_on_only_as_they_began(config):
    write_checkpoint(config, 3)
    with pytest.raises(ConfigError, match=r"lora_rank=8 must be what .* with, 0; set"):
        resume.check(replace(config, lora_rank=8))
    adapted = replace(config, lora_rank=8, run_name="adapted")
    write_checkpoint(adapted, 3)
    assert resume.check(replace(adapted, lora_dropout=0.1))
    for changed in ({"lora_alpha": 4.0}, {"lora_target_modules": "q_proj"}):
        with pytest.raises(ConfigError, match=f"{min(changed)}=.* must be what"):
            resume.check(replace(adapted, **changed))


def test_a_disk_with_too_little_space_is_found_before_training(config):
    storage.check_space(config, 1000)
    with pytest.raises(ConfigError, match=r"must have at least 1,000,000.0 GB free"):
        storage.check_space(config, 10**15)


def test_runs_of_one_name_in_two_buckets_share_no_local_folder(config, tmp_path):
    one, other, again = (
        manifest.local_folder(
            replace(config, storage_path=f"s3://{name}/runs", cache_dir=str(tmp_path))
        )
        for name in ("first", "second", "first")
    )
    assert one == again != other
    assert one.parent == other.parent == tmp_path
