"""A Hugging Face decoder's weights: read from its files, written back to files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
)
from torch.distributed.checkpoint.filesystem import FileSystem

from tp2d_lib.config import TrainConfig
from tp2d_lib.model import headers, lora
from tp2d_lib.model.architecture import build_empty_model
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
    lora.initialize(model, config)


def check_complete(missing: set[str], directory: Path) -> None:
    if missing:
        raise ValueError(
            f"{directory} must hold {min(missing)} ({len(missing)} missing)"
        )


def rebuild_buffers(model: nn.Module, twin: nn.Module) -> None:
    """Fill in what safetensors files do not hold, such as the rotary frequencies.

    transformers computes them when it initializes weights, so initialize a twin of the
    model whose parameters have no storage, and copy its buffers.
    """
    for name, buffer in list(twin.named_buffers()):
        module, _, key = name.rpartition(".")
        real = torch.empty_like(buffer, device="cpu")
        setattr(twin.get_submodule(module), key, real)
    twin.initialize_weights()
    for name, buffer in twin.named_buffers():
        model.get_buffer(name).copy_(buffer)
