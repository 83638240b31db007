"""A trained model as others read it: new weights, and the files of its source."""

from __future__ import annotations

import fnmatch
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import constants, save_torch_state_dict
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from tp2d_lib import store
from tp2d_lib.config import TrainConfig
from tp2d_lib.model import headers, lora
from tp2d_lib.model.architecture import build_empty_model
from tp2d_lib.model.files import INDEX, SINGLE, SMALL, present_directory

WEIGHTS = re.compile(r"model.*\.safetensors|adapter_(model|config)\.")
TYPE_KEYS = ("dtype", "torch_dtype")  # of config.json; the second until transformers 4


def export(
    model: nn.Module, config: TrainConfig, directory: Path | store.RemotePath
) -> str:
    """Write a sharded model that ``from_pretrained`` reads; every rank must call it.

    Returns:
        What was written, for the user.
    """
    partial, dtype = partial_folder(directory, config), type_of(config)
    if dist.get_rank() == 0:
        clear(partial)
    dist.barrier()
    adapters_only = config.lora_rank and not config.merge_adapter
    if adapters_only:
        state = lora.for_peft(model)
    else:
        state = headers.own_state(model) | lora.merged(model)
        state = revert_weight_conversion(build_empty_model(config), state)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    writer = HuggingFaceStorageWriter(
        str(partial), save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(partial / "sharded")
        (partial / INDEX).unlink()
        (written,) = partial.glob("*.safetensors")
        written.rename(partial / (lora.FILE if adapters_only else SINGLE))
        if adapters_only:
            lora.write_description(model, config, partial)
        else:
            copy_files(config, partial, dtype)
        publish(partial, directory)
    dist.barrier()
    said = description(directory, dtype, torch.float32)
    return said + lora.left_out(model) if adapters_only else said


def export_gathered(
    state: dict[str, torch.Tensor],
    config: TrainConfig,
    directory: Path | store.RemotePath,
) -> str:
    """``export``, of a full state dict; only one rank calls it."""
    partial, dtype = partial_folder(directory, config), type_of(config)
    clear(partial)
    empty = build_empty_model(config)
    state = {name: state[name] for name in headers.own_state(empty)}
    held = max((t.dtype for t in state.values()), key=lambda kind: kind.itemsize)
    state = {  # copies, because DeepSpeed keeps parameters as parts of one tensor
        name: tensor.to("cpu", dtype, copy=True).contiguous()
        for name, tensor in revert_weight_conversion(empty, state).items()
    }
    save_torch_state_dict(state, partial, max_shard_size="50GB")
    copy_files(config, partial, dtype)
    publish(partial, directory)
    return description(directory, dtype, held)


def type_of(config: TrainConfig) -> torch.dtype:
    """The type of an export's weights: as requested, or that of most in the source.

    Adapters have float32, in which they were trained.
    """
    if config.export_dtype != "auto":
        return getattr(torch, config.export_dtype)
    if config.lora_rank and not config.merge_adapter:
        return torch.float32
    sizes = Counter()
    for tensor in headers.read_files(present_directory(config), config).values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return max(headers.FLOATS.items(), key=lambda kind: sizes[kind[0]])[1]


def description(
    directory: Path | store.RemotePath,
    dtype: torch.dtype,
    held: torch.dtype,
) -> str:
    """Where an export is and in which type, and whether master weights were rounded.

    Args:
        held: the type of the weights that were written from.
    """
    said = f"exported to {directory} in {str(dtype).removeprefix('torch.')}"
    narrowest = min(dtype, held, key=lambda kind: kind.itemsize)
    if narrowest.itemsize < 4:
        rounded = str(narrowest).removeprefix("torch.")
        said += f"; the float32 master weights were rounded to {rounded}"
    return said


def copy_files(config: TrainConfig, directory: Path, dtype: torch.dtype) -> None:
    """Copy what belongs to a model besides its weights, byte for byte.

    transformers would write its own release's keys, for which earlier releases and
    other libraries then assume defaults, silently.
    """
    for path in sorted(present_directory(config).iterdir()):
        counts = any(fnmatch.fnmatch(path.name, pattern) for pattern in SMALL)
        if counts and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
    file = directory / constants.CONFIG_NAME
    whole = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if (text := whole.get_text_config()) is not whole:
        text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
        text.dtype = dtype
        text.save_pretrained(directory)
    elif config.export_dtype != "auto":
        content = json.loads(file.read_bytes())
        keys = [key for key in TYPE_KEYS if key in content]
        changed = content | dict.fromkeys(keys, config.export_dtype)
        if changed != content:
            file.write_text(json.dumps(changed, indent=2) + "\n")


def partial_folder(directory: Path | store.RemotePath, config: TrainConfig) -> Path:
    """Where an export is written until it is complete: beside its own folder.

    One that goes to a store is on the disk that all nodes share until then, under a
    name that no other address has.
    """
    if isinstance(directory, Path):
        return directory.with_name(f"{directory.name}.partial")
    return config.data_dir / f"{store.local_name(directory)}.partial"


def clear(partial: Path) -> None:
    """Delete what a dead attempt left."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def publish(partial: Path, directory: Path | store.RemotePath) -> None:
    """Make a complete export the content of its folder, where other files stay.

    At every moment the folder holds a whole model or none: the file that
    ``from_pretrained`` begins with is deleted first and arrives last. Of an earlier
    export only what is no weight may stay: it might be loaded with the new ones.
    """
    if isinstance(directory, Path) and not directory.exists():
        partial.rename(directory)
        return
    earlier = [name for name in store.names(directory) if WEIGHTS.match(name)]
    for name in sorted(earlier, key=is_first, reverse=True):
        (directory / name).unlink()
    for name in sorted(store.files(partial), key=is_first):
        if isinstance(directory, Path):
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.move(partial / name, directory / name)  # maybe to another disk
        else:
            store.copy(partial / name, directory / name)
    shutil.rmtree(partial)


def is_first(name: str) -> bool:
    """Whether ``from_pretrained`` looks for this file before all others."""
    return name in (SINGLE, INDEX, lora.DESCRIPTION)
