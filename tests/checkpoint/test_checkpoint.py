"""A checkpoint that was damaged, or belongs to other samples, is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.demo import make_config
from tp2d_lib import checkpoint, data
from tp2d_lib.checkpoint import integrity, ray_train
from tp2d_lib.config import ConfigError


def write_checkpoint(folder):
    """Run by one rank: a checkpoint's files, as commit writes them."""
    folder = Path(folder)
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 100)
    (folder / integrity.STATE_FILE).write_text(json.dumps({"step": 3}))
    integrity.write_checksums(folder)


@pytest.mark.parametrize("damage", ["one bit", "missing", "not complete"])
def test_damaged_checkpoint_is_refused(damage, pools, tmp_path):
    folder = tmp_path / "checkpoint-000003"
    pools(1).run(write_checkpoint, str(folder))
    checkpoint.verify(folder)
    weights = folder / "weights.bin"
    if damage == "one bit":
        content = bytearray(weights.read_bytes())
        content[1234] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "checksums-0.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=str(folder)):
        checkpoint.verify(folder)


def test_other_samples_are_refused(demo_paths, tmp_path):
    """A position counts rows: other rows or another seed would go on silently wrong."""
    config = make_config(demo_paths, tmp_path, 1, 1)
    config = replace(config, prepared_data=str(data.prepare(config)))
    state = ray_train.samples_of(config)
    ray_train.check_same_samples(state, config, Path("run/checkpoint-000003"))
    longer = replace(config, prepared_data=None, seq_length=128)
    longer = replace(longer, prepared_data=str(data.prepare(longer)))
    for other in (replace(config, seed=7), longer):
        with pytest.raises(ConfigError, match="try another run_name"):
            ray_train.check_same_samples(state, other, Path("run/checkpoint-000003"))
