"""Parity with one process: the same global batches for a mesh and the reference."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from tests.support import reference
from tests.support.models import VOCAB_SIZE
from tp2d_lib.config import TrainConfig

STEPS, ROWS, SEQ, MAX_GRAD_NORM = 4, 4, 32, 0.5


def make_steps(rows: str, accumulation: int) -> list:
    """The global batches of a run, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    steps = []
    for _ in range(STEPS):
        step = []
        for _ in range(accumulation):
            input_ids = torch.randint(VOCAB_SIZE, (ROWS, SEQ), generator=generator)
            labels = input_ids.clone()
            if rows == "padded":  # 2, 31, 5, 20 real tokens: unequal across dp
                for row, length in enumerate((2, 31, 5, 20)):
                    labels[row, length:] = -100
            step.append((input_ids, labels))
        steps.append(step)
    return steps


@cache  # DTensor goes on with the groups of the first of equal meshes
def the_mesh(dp_size, tp_size):
    from tp2d_lib.mesh import build_mesh

    return build_mesh(dp_size, tp_size)


def share_of(steps: list, mesh, share: int) -> list:
    """The micro-batches of this dp rank, as an engine takes them."""
    mine = slice(share * mesh["dp"].get_local_rank(), None)
    return [
        [{"input_ids": i[mine][:share], "labels": t[mine][:share]} for i, t in step]
        for step in steps
    ]


def train_references(models: dict, variants: list) -> dict:
    """What reference.train returns, for each model and variant."""
    return {
        (name, *variant): reference.train(
            path, variant[2], make_steps(*variant[:2]), MAX_GRAD_NORM
        )
        for name, path in models.items()
        for variant in variants
    }


def assert_weights_equal(
    got: dict, expected: dict, where: object = "", least: float = 0.9
) -> None:
    """Weights of a mesh are those of ``reference.train``, where these are settled."""
    every = torch.cat([weight.settled.flatten() for weight in expected.values()])
    assert every.float().mean() > least, every.float().mean()
    for name, weight in got.items():
        settled = expected[name].settled
        torch.testing.assert_close(
            weight[settled],
            expected[name][settled],
            rtol=0,
            atol=1e-4,
            msg=lambda text, name=name: f"{where} {name}: {text}",
        )


def make_config(model_dir, storage, tp_size, dp_size, variant, **settings):
    """The configuration of one run on a mesh, as the references have it."""
    _, accumulation, optimizer = variant
    # DeepSpeed exchanges F.linear for good in a process that ever used ZeRO 3.
    recompute = "full" if "zero_stage" in settings else "selective"
    return TrainConfig(
        model_name=model_dir,
        tp_size=tp_size,
        dp_size=dp_size,
        seq_length=SEQ,
        gradient_accumulation_steps=accumulation,
        batch_size_per_gpu=ROWS // dp_size,
        optimizer=optimizer,
        learning_rate={"adamw": 1e-3, "sgd": 0.5}[optimizer],
        max_grad_norm=MAX_GRAD_NORM,
        activation_checkpointing=recompute if accumulation == 2 else "none",
        storage_path=storage,
        prepared_data=write_rows(Path(storage) / "rows"),
        **settings,
    )


def write_rows(folder: Path) -> str:
    """Rows for a configuration to be complete; parity tests bring their own."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "input_ids.npy", np.ones((ROWS, SEQ), np.int32))
    np.save(folder / "lengths.npy", np.full(ROWS, SEQ, np.int32))
    return str(folder)
