"""What the headers of a model's files say, and which models they do not allow."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants, file_exists, get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from tp2d_lib.config import ConfigError, TrainConfig, first_line
from tp2d_lib.model.files import (
    ADAPTER,
    check_merged,
    damaged,
    local_directory,
    no_safetensors,
    weight_files,
)
from tp2d_lib.model.hub import errors_explained
from tp2d_lib.model.lora import is_adapter

FLOATS = {  # types that a weight may be stored in
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Stored(NamedTuple):
    """A tensor in a file: its sizes, and its type as safetensors spells it."""

    shape: list[int]
    dtype: str


def read(config: TrainConfig) -> dict[str, Stored]:
    """The tensors in the model's files, by name; of a Hub model, nothing is downloaded.

    Raises:
        ConfigError: the Hub does not hand them out, they are not safetensors, or not
            all of what they should be.
    """
    if os.path.isdir(config.model_name) or constants.HF_HUB_OFFLINE:
        return read_files(local_directory(config), config)
    repository = {"repo_id": config.model_name, "revision": config.model_revision}
    with errors_explained(config):
        check_merged(file_exists(filename=ADAPTER, **repository), config)
        try:
            files = get_safetensors_metadata(**repository).files_metadata.values()
        except NotASafetensorsRepoError as error:
            raise no_safetensors(config) from error
        except SafetensorsParsingError as error:
            raise damaged(config, "safetensors header", first_line(error)) from error
    return {
        name: Stored(info.shape, info.dtype)
        for file in files
        for name, info in file.tensors.items()
    }


def read_files(directory: Path, config: TrainConfig) -> dict[str, Stored]:
    """``read``, of a folder on this node."""
    found: dict[str, Stored] = {}
    for path in weight_files(directory, config):
        try:
            with safe_open(path, "pt") as file:  # as long as its header says
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = Stored(part.get_shape(), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise damaged(config, path.name, first_line(error)) from error
    return found


def check(
    model: nn.Module, stored: dict[str, Stored], config: TrainConfig
) -> dict[str, str]:
    """Refuse files from which the model cannot be read as ``from_pretrained`` reads it.

    Args:
        model: empty, and not sharded.
        stored: what ``read`` or ``read_files`` found.

    Returns:
        The names in the files, by the model's names. Tensors are missing that are made
        of several, such as all experts of a layer.

    Raises:
        ConfigError: names the first tensor that is missing, is quantized, or has other
            sizes; or two different ones that ``config.json`` ties.
    """
    names, combined = match(model, stored)
    check_types(model, names, stored, config)
    check_shapes(model, names, stored, config)
    check_tied(model, names, config)
    missing = own_state(model).keys() - names.keys()
    if missing and not combined:
        raise ConfigError(
            f"model_name={config.model_name!r} must hold every weight of "
            f"{type(model).__name__}, but lacks {min(missing)!r} ({len(missing)} "
            "missing); try another copy of the model"
        )
    return names


def match(
    model: nn.Module, stored: dict[str, Stored]
) -> tuple[dict[str, str], list[str]]:
    """The names in the files, by the model's names, as transformers renames them.

    Files may have names of an earlier release, those of a model without a head or of
    one with images, or a tied weight under its second name.

    Returns:
        The names, and those in the files that are combined with others.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    combined = []
    for name in sorted(stored):  # some renamings depend on the order
        new, rule = rename_source_key(name, renamings, converters, prefix, own)
        if new not in own and name in own:
            new, rule = name, None
        if rule is not None:
            combined.append(name)
        elif new in own:
            names[new] = name
    for second, first in model.all_tied_weights_keys.items():
        if first not in names and second in names:
            names[first] = names[second]
    return names, combined


def own_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors by name, as files have them, without adapters.

    A tied weight is there once, under its first name.
    """
    second_names = {
        second
        for second, first in model.all_tied_weights_keys.items()
        if model.get_parameter(second) is model.get_parameter(first)
    }
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in second_names and not is_adapter(name)
    }


def check_tied(model: nn.Module, names: dict[str, str], config: TrainConfig) -> None:
    """``config.json`` ties no two tensors that are different in the files.

    transformers does not tie those, whatever it says; other libraries drop the second.
    """
    for second, first in model.all_tied_weights_keys.items():
        both = names.get(first), names.get(second)
        if None in both or len(set(both)) == 1 or same_in_files(both, config):
            continue
        raise ConfigError(
            f"model_name={config.model_name!r} must hold one tensor for what its "
            f"config.json ties, but {both[0]!r} and {both[1]!r} differ; try "
            "tie_word_embeddings=false in its config.json"
        )


def same_in_files(names: tuple[str, str], config: TrainConfig) -> bool:
    """Whether two tensors are equal; of a Hub model, the files are downloaded."""
    parts = []
    with ExitStack() as stack:
        for path in weight_files(local_directory(config), config):
            file = stack.enter_context(safe_open(path, "pt"))
            held = set(file.keys())
            parts += [file.get_slice(name) for name in names if name in held]
        one, other = parts
        rows = range(0, one.get_shape()[0], 4096)  # a few at once
        pieces = ([part[row : row + 4096].float() for part in parts] for row in rows)
        return one.get_shape() == other.get_shape() and all(
            torch.equal(*pair) for pair in pieces
        )


def check_types(
    model: nn.Module,
    names: dict[str, str],
    stored: dict[str, Stored],
    config: TrainConfig,
) -> None:
    """Each weight is stored as a number, not as bits that need a scale.

    Where a weight is missing, the quantized one may have a name of its own beside it.
    """
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        beside = [n for n in stored if n.startswith(f"{module}.")]
        for found in [names[name]] if name in names else beside:
            if (kind := stored[found].dtype) not in FLOATS:
                raise ConfigError(
                    f"model_name={config.model_name!r} must hold weights in "
                    f"floating-point types of 16 bits or more, but {found!r} is "
                    f"quantized to {kind}; try the unquantized model"
                )


def check_shapes(
    model: nn.Module,
    names: dict[str, str],
    stored: dict[str, Stored],
    config: TrainConfig,
) -> None:
    """The sizes in ``config.json`` are those of the tensors in the files."""
    for name, tensor in model.state_dict().items():
        sizes = list(tensor.shape)
        if name in names and (found := list(stored[names[name]].shape)) != sizes:
            raise ConfigError(
                f"model_name={config.model_name!r} must hold tensors of the sizes in "
                f"its config.json, which makes {name} {sizes}, not {found}; try "
                "another copy of the model"
            )
