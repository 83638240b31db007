"""Where a run's ranks go: which device, and which nodes, so that TP groups stay whole.

A TP group communicates in every layer: over the network between nodes it would wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import ray
import ray._private.state  # no public API tells what a cluster may grow to
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model import build_empty_model
from tp2d_lib.run import cluster

REPLACE_S = 600.0  # a cloud needs minutes to replace a node
PATIENCE_S = 10.0  # until what a lost attempt held is free
NODE = "ray.io/node-id"  # the label that Ray gives every node
SMALL = 1_000_000_000  # parameters that device="auto" trains on CPUs
OLD = {"K80", "P4", "P100", "T4", "V100"}  # in Ray's words, GPUs without bfloat16


def pick_device(config: TrainConfig) -> str:
    """ "cuda" or "cpu"; joins Ray to count its GPUs, unless ``device`` is "cpu".

    What counts is the cluster, with the nodes that it may still add: the driver's own
    node may have no GPU.

    Raises:
        ConfigError: there are too few GPUs, or none for a model too large for CPUs.
    """
    if config.device == "cpu":
        return "cpu"
    cluster.connect()
    found = gpus()
    if config.device == "auto" and found == 0:
        check_small(config)
        print("the cluster has no GPU: training on CPUs")
        return "cpu"
    if found < widths(config)[-1].num_workers:
        fits = f"tp_size and dp_size whose product is at most {found}, or "
        raise ConfigError(
            f"num_workers={config.num_workers} must not exceed the cluster's {found} "
            f"GPUs; try {fits * (found > 0)}device='cpu'"
        )
    return "cuda"


def pick_dtype(config: TrainConfig) -> str:
    """``dtype``, or "float32" instead of "auto" if a GPU of the cluster is too old.

    The driver's own node may have no GPU, and all ranks must compute in one type.
    """
    fixed = config.device != "cuda" or config.dtype != "auto" or config.autocast
    if fixed or not ray.is_initialized():
        return config.dtype
    kinds = {name.removeprefix("accelerator_type:") for name in ray.cluster_resources()}
    if not (old := kinds & OLD):
        return "auto"
    print(f"{', '.join(sorted(old))} without native bfloat16: float32 throughout")
    return "float32"


def gpus() -> int:
    """How many GPUs the cluster has, or may add."""
    return max(cluster.gpus(), gpus_later())


def gpus_later() -> int:
    """How many GPUs the cluster may grow to; 0 if it does not scale by itself."""
    limits = ray._private.state.state.get_max_resources_from_cluster_config()
    return int((limits or {}).get("GPU", 0))


def check_small(config: TrainConfig) -> None:
    size = sum(p.numel() for p in build_empty_model(config).parameters())
    if size > SMALL:
        raise ConfigError(
            f"device='auto' must find a GPU to train {size / 1e9:.1f} billion "
            "parameters, but the cluster has none; try device='cpu' if you mean it"
        )


def resources(config: TrainConfig) -> dict[str, float]:
    """What one worker asks Ray for: more workers than CPUs share them."""
    share = ray.cluster_resources().get("CPU", 1) / config.num_workers
    cpus = math.floor(100 * share) / 100  # Ray rounds after four digits
    cpus = min(max(cpus, 0.01), 1.0)
    return {"CPU": cpus} | ({"GPU": 1} if config.device == "cuda" else {})


def bundles(config: TrainConfig) -> list[dict[str, float]]:
    """What must be on one node, as resources: a TP group, or a worker alone.

    With ``dp_replicate_size`` the ranks that shard a copy of the model, if nodes hold
    them: they gather each layer, while copies only add up gradients.
    """
    if config.tp_across_nodes != "refuse":
        return of_size(config, 1)
    copy = of_size(config, config.num_workers // config.dp_replicate_size)
    if config.dp_replicate_size > 1 and fits(copy):
        return copy
    return of_size(config, config.tp_size)


def of_size(config: TrainConfig, together: int) -> list[dict[str, float]]:
    need = {name: together * part for name, part in resources(config).items()}
    return [need] * (config.num_workers // together)


def fits(wanted: list[dict[str, float]]) -> bool:
    return held(wanted[0]) >= len(wanted)


def held(bundle: dict[str, float]) -> int:
    """How often the cluster's nodes hold a bundle, while they are idle."""
    return sum(
        min(int(node["Resources"].get(name, 0) / n) for name, n in bundle.items())
        for node in cluster.nodes()
    )


def check_nodes(config: TrainConfig) -> None:
    """Find before training that the nodes cannot hold the TP groups, even when idle.

    Raises:
        ConfigError: a TP group would span nodes.
    """
    wanted = bundles(widths(config)[-1])
    if not fits(wanted) and not gpus_later():
        raise ConfigError(
            f"tp_size={config.tp_size} must fit into single nodes {len(wanted)} times, "
            f"but they hold {held(wanted[0])} such groups; try a smaller tp_size, or "
            "tp_across_nodes='warn'"
        )


def find(
    config: TrainConfig, show: Callable[..., None], seconds: float = REPLACE_S
) -> list[dict[str, str]] | None:
    """A label selector for each worker, so that every TP group is on one node.

    Ray itself packs workers without regard to TP groups. So reserve the groups, which
    also makes the cluster grow, see where they are, and give them back. Waits aloud
    while GPUs are busy or a lost node is replaced; Ray would, silently and for ever.

    Returns:
        One selector per worker, in rank order; None where TP groups may span nodes.

    Raises:
        ConfigError: no room was found.
    """
    wanted = bundles(config)
    what = f"{len(wanted)} x {describe(wanted[0])}, each on one node"
    with reserved(wanted) as group:
        if not group.wait(2):
            show(f"waiting for {what}")
            if not group.wait(seconds):
                raise ConfigError(
                    f"num_workers={config.num_workers} needs "
                    f"{what}, which were not free within {seconds:.0f} s; try fewer"
                )
        where = placement_group_table(group)["bundles_to_node_id"]
    if config.tp_across_nodes != "refuse":
        return None
    found = sorted(where[index] for index in range(len(wanted)))
    each = config.num_workers // len(wanted)
    return [{NODE: node} for node in found for _ in range(each)]


def place(
    config: TrainConfig, show: Callable[..., None]
) -> tuple[TrainConfig, list[dict[str, str]] | None]:
    """The widest configuration that there is room for now, and where its ranks go.

    Raises:
        ConfigError: there is no room even for the narrowest, after a while.
    """
    *wider, narrowest = widths(config)
    for width in wider:
        with suppress(ConfigError):
            return width, find(width, lambda text: None, seconds=PATIENCE_S)
    return narrowest, find(narrowest, show)


def widths(config: TrainConfig) -> list[TrainConfig]:
    """The configuration, then narrower ones with the same global batch.

    Down to ``min_dp_size``: fewer dp ranks read the same samples in more micro-batches.
    """
    batches = config.dp_size * config.gradient_accumulation_steps
    fewest = config.min_dp_size or config.dp_size
    return [
        replace(
            config,
            dp_size=dp_size,
            min_dp_size=None,
            num_workers=dp_size * config.tp_size,
            gradient_accumulation_steps=batches // dp_size,
        )
        for dp_size in range(config.dp_size, fewest - 1, -1)
        if batches % dp_size == 0
    ]


def has_room(config: TrainConfig, width: TrainConfig) -> bool:
    """Whether, beside a run of this width, there is now room for all its dp ranks."""
    missing = (config.num_workers - width.num_workers) // config.tp_size
    with reserved(of_size(config, config.tp_size)[:missing]) as group:
        return group.wait(1)


@contextmanager
def reserved(wanted: list[dict[str, float]]) -> Iterator[PlacementGroup]:
    """A reservation, not waited for, that is given back at the end of the block."""
    group = placement_group(wanted, strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


def describe(bundle: dict[str, float]) -> str:
    kind = "GPU" if "GPU" in bundle else "CPU"
    return f"{bundle[kind]:g} {kind}{'s' * (bundle[kind] != 1)}"
