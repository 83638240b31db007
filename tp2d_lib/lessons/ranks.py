"""A few live ranks for a notebook: CPU processes in one gloo group."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class Rank:
    """One process, which joins the group and keeps what functions store on ``here``."""

    def __init__(self, rank: int, world_size: int):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # lessons run on the CPU everywhere
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed reads it
        self.here = SimpleNamespace(rank=rank, world_size=world_size)

    def address(self) -> tuple[str, int]:
        with socket.socket() as server:
            server.bind(("", 0))
            return ray.util.get_node_ip_address(), server.getsockname()[1]

    def join(self, host: str, port: int) -> None:
        import torch  # here, as below: after CUDA_VISIBLE_DEVICES is set
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=self.here.rank,
            world_size=self.here.world_size,
        )

    def call(self, function: Callable, args: tuple) -> Any:
        return function(self.here, *args)


class Ranks:
    """``ranks.run(fn)`` runs ``fn(here)`` on every rank and returns the results.

    ``here`` is the rank's own namespace: ``here.rank``, and whatever earlier functions
    stored on it, such as ``here.mesh``.
    """

    def __init__(self, count: int):
        node = ray.get_runtime_context().get_node_id()  # the driver's: one for all
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        kind = Rank.options(scheduling_strategy=here)
        self.actors = [kind.remote(rank, count) for rank in range(count)]
        host, port = ray.get(self.actors[0].address.remote())
        ray.get([actor.join.remote(host, port) for actor in self.actors])

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """Results in rank order; an exception on a rank is raised in the notebook."""
        if not self.actors:
            raise RuntimeError(
                "these ranks have been shut down; try ranks = Ranks(4) again"
            )
        return ray.get([actor.call.remote(function, args) for actor in self.actors])

    def shutdown(self) -> None:
        """End the processes, so that training has the machine to itself."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
