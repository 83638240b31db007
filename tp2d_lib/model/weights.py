"""A Hugging Face decoder's weights: read from its files, written back to files."""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from tp2d_lib import store
from tp2d_lib.config import TrainConfig
from tp2d_lib.model import headers
from tp2d_lib.model.architecture import build_empty_model, load_model_config
from tp2d_lib.model.files import model_directory, weight_files
from tp2d_lib.model.guards import check_finite
from tp2d_lib.model.headers import own_state


class ListedFiles(FileSystem):
    def __init__(self, files: list[Path]):
        self.files = [str(file) for file in files]

    def ls(self, path: str) -> list[str]:
        return self.files


class WeightsReader(HuggingFaceStorageReader):
    """PyTorch's reader, of the given files: it would read all safetensors files."""

    def __init__(self, directory: Path, files: list[Path]):
        super().__init__(str(directory))
        self.fs = ListedFiles(files)


def load_pretrained(
    model: nn.Module, config: TrainConfig, device: torch.device
) -> None:
    """Fill an empty, sharded model: each rank reads only its own slices from disk.

    Raises:
        ConfigError: the files are not those of this model, or are quantized.
        ValueError: a parameter of the model has no tensor in the files.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    directory, twin = model_directory(config), build_empty_model(config)
    names = headers.check(twin, headers.read_files(directory, config), config)
    model.to_empty(device=device)
    rebuild_buffers(model, twin)
    wanted = own_state(model)
    check_complete(wanted.keys() - names.keys(), directory)
    wanted = {names[name]: tensor for name, tensor in wanted.items()}
    reader = WeightsReader(directory, weight_files(directory, config))
    dcp.load(wanted, storage_reader=reader)
    check_finite(wanted, directory)


def check_complete(missing: set[str], directory: Path) -> None:
    if missing:
        raise ValueError(
            f"{directory} must hold {min(missing)} ({len(missing)} missing)"
        )


def rebuild_buffers(model: nn.Module, twin: nn.Module) -> None:
    """Fill in what safetensors files do not hold, such as the rotary frequencies.

    transformers computes them when it initialises weights, so initialise a twin of the
    model whose parameters have no storage, and copy its buffers.
    """
    for name, buffer in list(twin.named_buffers()):
        module, _, key = name.rpartition(".")
        real = torch.empty_like(buffer, device="cpu")
        setattr(twin.get_submodule(module), key, real)
    twin.initialize_weights()
    for name, buffer in twin.named_buffers():
        model.get_buffer(name).copy_(buffer)


def partial_folder(directory: Path | store.RemotePath, config: TrainConfig) -> Path:
    """Where an export is written until it is complete: beside its own folder.

    One that goes to a store is on the disk that all nodes share until then.
    """
    home = directory.parent if isinstance(directory, Path) else config.data_dir
    return home / f"{directory.name}.partial"


def clear(partial: Path) -> None:
    """Delete what a dead attempt left."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def publish(partial: Path, directory: Path | store.RemotePath) -> None:
    """Make a complete export the content of its folder, where other files stay.

    At every moment the folder holds a whole model or none: the file that
    ``from_pretrained`` begins with is deleted first and arrives last.
    """
    if isinstance(directory, Path) and not directory.exists():
        partial.rename(directory)
        return
    earlier = fnmatch.filter(store.names(directory), "model*.safetensors*")
    for name in sorted(earlier, key=is_first, reverse=True):
        (directory / name).unlink()  # else it might be loaded with the new ones
    for name in sorted(store.files(partial), key=is_first):
        if isinstance(directory, Path):
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.move(partial / name, directory / name)  # maybe to another disk
        else:
            store.copy(partial / name, directory / name)
    shutil.rmtree(partial)


def is_first(name: str) -> bool:
    """Whether ``from_pretrained`` looks for this file before all others."""
    return name in ("model.safetensors", "model.safetensors.index.json")


def export(
    model: nn.Module, config: TrainConfig, directory: Path | store.RemotePath
) -> None:
    """Write a sharded model as ``save_pretrained`` would; every rank must call it."""
    partial = partial_folder(directory, config)
    if dist.get_rank() == 0:
        clear(partial)
    dist.barrier()
    hf = load_model_config(config)
    state = {
        name: tensor.to(hf.dtype or torch.float32)
        for name, tensor in own_state(model).items()
    }
    writer = HuggingFaceStorageWriter(
        str(partial), save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(partial / "sharded")
        export_config(config, partial)
        publish(partial, directory)
    dist.barrier()


def export_gathered(
    state: dict, config: TrainConfig, directory: Path | store.RemotePath
) -> None:
    """Write a full state dict as ``save_pretrained`` would; only one rank calls it."""
    partial, hf = partial_folder(directory, config), load_model_config(config)
    clear(partial)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf, dtype=hf.dtype or torch.float32)
    model.load_state_dict(
        {name: tensor.to(model.dtype) for name, tensor in state.items()}, assign=True
    )
    model.tie_weights()
    model.save_pretrained(partial)
    export_config(config, partial)
    publish(partial, directory)


def export_config(config: TrainConfig, directory: Path) -> None:
    """Write what belongs to a model besides its weights."""
    for part in (AutoConfig, AutoTokenizer, GenerationConfig):
        with contextlib.suppress(
            OSError, ValueError
        ):  # not every model has all of them
            part.from_pretrained(
                config.model_name,
                revision=config.model_revision,
                trust_remote_code=False,
            ).save_pretrained(directory)
