"""DeepSpeed checkpoints loaded on another mesh, through Universal Checkpoint."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import PARAM

from tp2d_lib import store
from tp2d_lib.checkpoint import manifest, resume
from tp2d_lib.checkpoint.manifest import CheckpointError, NotFetchedError
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.mesh import is_first_on_node, made_by_nodes

FILES = "deepspeed"  # folder of DeepSpeed's own files in a checkpoint
LAYOUT_FILE = "layout.json"  # beside DeepSpeed's files
TAG = "universal"  # the folder of the converted files
LAYOUT = ("tp_size", "dp_size", "zero_stage")
PLAN = ("partition_config", "vocab_parallel_lm_head")


# Its processes must inherit what they may load, so they are forked; Python 3.14 does
# not do so by itself.
CONVERT = """
import multiprocessing
from deepspeed.checkpoint import ds_to_universal
from tp2d_lib.autotp import files
from tp2d_lib.checkpoint import plain

multiprocessing.set_start_method("fork", force=True)
arguments = ds_to_universal.parse_arguments()
with plain.only(arguments.input_folder, files.ALLOWED):
    ds_to_universal.main(arguments)
"""


def layout(config: TrainConfig) -> dict:
    """What determines the layout of DeepSpeed's files; any other must be converted."""
    names = LAYOUT + (PLAN if config.tp_size > 1 else ())
    if config.vocab_parallel_lm_head is None:  # undecided: as it is in the files
        names = tuple(name for name in names if name != "vocab_parallel_lm_head")
    return {name: getattr(config, name) for name in names}


def fits(stored: dict, config: TrainConfig) -> bool:
    """Whether files of this layout can be loaded as they are."""
    return stored | layout(config) == stored


def check(stored: dict, config: TrainConfig, directory: object) -> None:
    """Refuse a layout that Universal Checkpoint cannot convert.

    It converts the state of AdamW, from ZeRO 1 or 2 to 1 or 2, and from 3 to 3.

    Raises:
        ConfigError: the optimizer or the ZeRO stage cannot be converted.
    """
    if fits(stored, config):
        return
    before, now = stored["zero_stage"], config.zero_stage
    wrote = ", ".join(f"{name}={stored[name]}" for name in LAYOUT)
    if config.optimizer != "adamw":
        raise ConfigError(
            f"optimizer={config.optimizer!r} must be 'adamw' to load {directory} in "
            f"a layout other than its own, {wrote}"
        )
    if not before or not now or (before == 3) != (now == 3):
        raise ConfigError(
            f"zero_stage={now} cannot load {directory}, written with {wrote}: "
            "Universal Checkpoint converts between stages 1 and 2, and from 3 to 3; "
            f"try zero_stage={before} on the same mesh"
        )


class ConversionError(CheckpointError):
    """DeepSpeed's converter could not read a checkpoint."""


def prepare_start(config: TrainConfig, show: Callable[[str], None] = print) -> None:
    """Fetch the checkpoint that a run will load from a store, convert it if need be.

    The driver calls it, holding the run's lease, before any worker holds a GPU: it may
    take longer than a process group waits. The result is on the disk that nodes share
    until the run has a newer checkpoint: 12 bytes per parameter, 24 at the peak, when
    the converter holds extracted and merged slices.

    Raises:
        ConfigError: it does not fit on the disk.
        ConversionError: with the converter's last line.
    """
    from tp2d_lib.checkpoint import storage  # here: it needs Arrow, an engine does not

    manifest.remove_converted(config)  # made for an earlier start, and not verified
    for folder in resume.candidates(config):
        with suppress(CheckpointError):  # damaged: the workers tell, and skip it too
            manifest.check(folder)
            stored = json.loads((folder / LAYOUT_FILE).read_text())
            source, target = folder, place(folder, config)
            if store.is_remote(folder):
                show(f"fetching {folder.name}, once for all nodes")
                source = store.fetch(folder, target.with_name(f"{target.name}-source"))
            elif fits(stored, config):
                return
            manifest.verify(source)
            break
    else:
        return
    if fits(stored, config):
        source.rename(target)
        return
    files = manifest.read(folder)["files"].values()
    storage.check_space(config, 2 * sum(file["size"] for file in files), "conversion")
    show(f"converting {folder.name} for the new mesh, once")
    partial = target.with_name(f"{target.name}{manifest.PARTIAL}")
    if error := convert(source / FILES, partial / TAG):
        raise failed(folder, error)
    partial.rename(target)
    if source != folder:
        shutil.rmtree(source)


def on_disk(checkpoint: manifest.Folder, config: TrainConfig) -> Path:
    """A checkpoint's folder, or of one in a store what the driver made of it.

    Raises:
        NotFetchedError: it made nothing, because a file was damaged.
    """
    folder = checkpoint if isinstance(checkpoint, Path) else place(checkpoint, config)
    if folder is None or not folder.exists():
        raise NotFetchedError(f"{checkpoint} must be undamaged to be fetched")
    return folder


def place(checkpoint: manifest.Folder, config: TrainConfig) -> Path | None:
    """Where the driver of a run puts a checkpoint that it has converted."""
    if not (checkpoint / manifest.MANIFEST).is_file():  # saved outside a run
        return None
    content = manifest.digest_of(manifest.read(checkpoint))
    return manifest.local_folder(config) / f"{manifest.CONVERTED}{content[:16]}"


def failed(checkpoint: manifest.Folder, error: str) -> ConversionError:
    return ConversionError(f"{checkpoint} must be convertible: {error}")


@contextmanager
def converted(checkpoint: manifest.Folder, config: TrainConfig) -> Iterator[Path]:
    """A folder with the converted checkpoint; every rank must enter it.

    Without a driver that has prepared it, it is made in the temporary folder of each
    node (``TMPDIR``), while the ranks wait.

    Raises:
        ConversionError: with the converter's last line.
    """
    prepared = place(checkpoint, config)
    if prepared and prepared.exists():
        yield prepared
        return
    folder = error = None
    if is_first_on_node():
        folder = Path(tempfile.mkdtemp(prefix="tp2d-universal-"))
        error = convert(checkpoint / FILES, folder / TAG)
    folders, error = made_by_nodes(folder, error)
    try:
        if error:
            raise failed(checkpoint, error)
        yield folders[socket.gethostname()]
        dist.barrier()  # others may still be reading
    finally:
        if folder:
            shutil.rmtree(folder)


def convert(source: Path, target: Path) -> str | None:
    """Run DeepSpeed's converter; returns its last error line if it fails."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", CONVERT),
            *("--input_folder", str(source), "--output_folder", str(target)),
            "--inject_missing_state",  # a checkpoint without tp records less
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        for path in target.glob(f"zero/*/{kind}.pt"):
            # Without tp, ZeRO 3 writes bare tensors, which its loader would not split.
            value = torch.load(path, weights_only=True)
            if isinstance(value, torch.Tensor):
                torch.save({PARAM: value}, path)
    return None
