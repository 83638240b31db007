"""A run whose checkpoints are damaged resumes from the newest good one, or says why."""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.damage import DAMAGES, damaged
from tests.support.demo import make_config
from tp2d_lib import data
from tp2d_lib.checkpoint import CheckpointError, checksums, manifest, restore, saving
from tp2d_lib.data import build_dataloader
from tp2d_lib.mesh import build_mesh

STEPS = 6  # with a checkpoint after each second one
ENGINES = ("fsdp", "autotp")


@cache  # an engine may load many times
def build(kind, config):
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = import_module(f"tp2d_lib.{kind}").build_engine(config, mesh)
    return engine, build_dataloader(config, mesh)


def resume(kind, config, trains=True):
    """Run by every rank: restore what there is, train to the end, as the loop does.

    Returns the step that was restored and what was said about it.
    """
    engine, loader = build(kind, config)
    notices = []
    try:
        state = restore(engine, config, notices.append)
    except CheckpointError as error:
        return str(error), notices
    loader.step, loader.position = state["step"], state["position"]
    for batch in loader if trains else ():
        engine.step(batch)
        if loader.step % 2 == 0:
            state = {"step": loader.step, "position": loader.position, "history": []}
            saving.save(engine, state, config)()
    return state["step"] if not trains else None, notices


@pytest.fixture(scope="module", params=ENGINES)
def run(request, demo_paths, tmp_path_factory, pools):
    """A run with three checkpoints: its engine, configuration and ranks."""
    storage = tmp_path_factory.mktemp("storage")
    config = make_config(demo_paths, storage, 2, 1, max_steps=STEPS, run_name="run")
    config = replace(config, save_total_limit=3)
    config = replace(config, prepared_data=str(data.prepare(config)))
    ranks = pools(2, request.param)
    ranks.run(resume, request.param, config)
    assert len(manifest.checkpoints(config)) == 3
    return request.param, config, ranks


def recovers(run, paths: list[Path], damage: str) -> bool:
    """Whether the newest checkpoint but those damaged is restored, and they are named.

    The damaged files are of the newest checkpoints.
    """
    kind, config, ranks = run
    newest = manifest.checkpoints(config)
    left = newest[len({path.relative_to(newest[0].parent).parts[0] for path in paths})]
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(damaged(path, damage))
        ((step, said), (other, _)) = ranks.run(resume, kind, config, False)
    named = all(str(path.name) in "".join(said) for path in paths)
    return step == other == manifest.step_of(left) and named


def save_on_a_full_disk(kind, config, name):
    """Run by one rank: the kernel says of this file that there is no space left."""
    engine, loader = build(kind, config)
    state = {"step": loader.step + 1, "position": 0, "history": []}
    file = manifest.partial_folder(config, state["step"]) / name
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"must have space .* the disk is full"):
        saving.save(engine, state, config)()
    saving.WRITING.acquire(blocking=False)
    saving.WRITING.release()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")
@pytest.mark.parametrize(
    ("kind", "name"),
    [("fsdp", "__0_0.distcp"), ("autotp", "deepspeed/mp_rank_00_model_states.pt")],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    kind, name, demo_paths, tmp_path, pools
):
    config = make_config(demo_paths, tmp_path, 1, 1, max_steps=2, run_name="run")
    config = replace(config, prepared_data=str(data.prepare(config)))
    ranks = pools(1, kind)
    ranks.run(resume, kind, config)
    ranks.run(save_on_a_full_disk, kind, config, name)
    assert manifest.last_of(config).endswith("checkpoint-000002")
    manifest.remove_leftovers(config)
    assert len(list(manifest.run_folder(config).iterdir())) == 1


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_file_and_every_damage(run, survived):
    kind, config, _ = run
    for path in files_of(manifest.checkpoints(config)[0]):
        for damage in DAMAGES:
            good = recovers(run, [path], damage)
            assert survived(f"corruptions recovered, {kind}", good), (path, damage)


def test_the_newest_good_one_is_restored(run):
    """One file of the newest; the manifests of two; then all, which is a clear stop."""
    kind, config, ranks = run
    folders = manifest.checkpoints(config)
    largest = max(files_of(folders[0]), key=lambda path: path.stat().st_size)
    assert recovers(run, [largest], "flip")
    assert recovers(run, [folder / "manifest.json" for folder in folders[:2]], "delete")
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(damaged(folder / "trainer_state.json", "flip"))
        for error, said in ranks.run(resume, kind, config, False):
            assert len(said) == 3
            assert "must hold an undamaged checkpoint to resume from" in error


def test_a_damaged_run_ends_as_if_it_had_not_been(run, tmp_path):
    """Bit-equal: the steps after the good checkpoint are trained again."""
    kind, config, ranks = run
    shutil.copytree(config.storage_path, tmp_path / "copy")
    copy = replace(config, storage_path=str(tmp_path / "copy"))
    whole = checksums(manifest.checkpoints(config)[0])
    for folder in manifest.checkpoints(copy)[:2]:
        shutil.rmtree(folder)
    ranks.run(resume, kind, copy)
    again = checksums(manifest.checkpoints(copy)[0])
    same = {name for name in whole if whole[name] == again.get(name)}
    assert {n for n in whole if n.endswith((".distcp", ".pt"))} <= same
