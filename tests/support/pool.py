"""Real ranks for tests: processes in one gloo group that run functions on request."""

import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import wait
from pathlib import Path

TIMEOUT_S = 120
# Ranks, and the processes of dry runs, are forked from one that has these loaded.
FORKSERVER = multiprocessing.get_context("forkserver")
LOADED = ["torch._dynamo", "transformers.models.llama.modeling_llama", "pytest"]
LOADED += ["ray.train.torch", "tests.support.demo"]  # what files of tests import
FORKSERVER.set_forkserver_preload(["tp2d_lib.autotp", "tp2d_lib.fsdp", *LOADED])


def serve(rank: int, world_size: int, store: str, pipe, environment: dict) -> None:
    os.environ.update(environment)  # before anything reads it
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class Pool:
    """``run(function, *args)`` calls it on every rank; answers come in rank order.

    Ranks with an environment of their own are started anew, which takes seconds:
    libraries read some variables when they are imported.
    """

    def __init__(self, world_size: int, **environment: str):
        context = multiprocessing.get_context("spawn") if environment else FORKSERVER
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            args = (rank, world_size, store, theirs, environment)
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()  # so that a rank that dies is seen, not waited for
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args, seconds: float = TIMEOUT_S):
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = {}
        while len(answers) < len(self.pipes):
            waiting = [pipe for pipe in self.pipes if pipe not in answers]
            for pipe in wait(waiting, timeout=seconds):
                good, answers[pipe] = pipe.recv()
                if not good:  # the others may wait for this rank for ever
                    raise RuntimeError(answers[pipe])
            if not set(waiting) & set(answers):
                raise TimeoutError(f"no rank answered within {seconds} s")
        return [answers[pipe] for pipe in self.pipes]

    def close(self) -> None:
        for process in self.processes:  # nothing to lose, and an orderly end takes long
            process.kill()
            process.join()
        self.folder.cleanup()
