"""What a run records: loss, norms, speed, memory and MFU."""

from __future__ import annotations

import math
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

from tp2d_lib import data, store
from tp2d_lib.checkpoint import manifest
from tp2d_lib.config import TrainConfig
from tp2d_lib.model import build_empty_model
from tp2d_lib.run import gpus, health


def flops_per_token(model: nn.Module, seq_length: int) -> float:
    """Floating-point operations to train on one token.

    6 N for N parameters, 4 N for those that are not trained, embedding counted once as
    the head, and 12 * layers * heads * head_dim * seq_length for attention: PaLM
    (arXiv:2204.02311), appendix B. Of experts, those that a token visits are counted;
    recomputation by activation checkpointing is not.
    """
    hf = model.config.get_text_config()
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    named = dict(model.named_parameters())
    flops = {n: (6 if p.requires_grad else 4) * p.numel() for n, p in named.items()}
    share = share_of_experts(hf)
    products = sum(n * (share if ".experts." in k else 1) for k, n in flops.items())
    if not hf.tie_word_embeddings:  # an embedding looks up and does not multiply
        embedding = model.get_input_embeddings().weight
        products -= next(flops[k] for k, p in named.items() if p is embedding)
    attention = (
        12 * hf.num_hidden_layers * hf.num_attention_heads * head_dim * seq_length
    )
    return products + attention


def share_of_experts(hf: PretrainedConfig) -> float:
    """How many of a layer's experts a token visits; 1 where that is not known."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    every = next(filter(None, (getattr(hf, name, None) for name in names)), None)
    visited = getattr(hf, "num_experts_per_tok", None)
    return visited / every if visited and every else 1.0


def peak_memory(device: torch.device) -> int:
    """Peak memory of this rank in bytes: on the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident_bytes("VmHWM")  # ru_maxrss may be that of the parent


def resident_bytes(kind: str) -> int:
    """Memory of this process, of a kind in Linux's ``/proc/self/status``.

    ``RssAnon`` is that of no file, ``RssFile`` that of mapped files, ``VmHWM`` the peak
    of both together.

    Raises:
        OSError: there is no such file; not on Linux.
    """
    status = Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(rf"^{kind}:\s+(\d+) kB$", status, re.M)
    return int(kilobytes) * 1024


class Metrics:
    """Keep step results on the device; read them every ``log_interval`` steps."""

    def __init__(
        self,
        engine,
        config: TrainConfig,
        step: int,
        history: list[dict],
        publish: Callable[[dict], None],
    ):
        self.engine, self.config, self.history = engine, config, history
        self.publish = publish
        self.writer = None
        if dist.get_rank() == 0 and config.run_name:
            from torch.utils.tensorboard import SummaryWriter  # here: slow to import

            self.events = manifest.run_folder(config) / "tensorboard"
            remote = store.is_remote(self.events)  # it would append to a file there
            self.local = Path(tempfile.mkdtemp()) if remote else self.events
            # Points after the checkpoint belong to the attempt that was lost.
            self.writer = SummaryWriter(str(self.local), purge_step=step + 1)
        self.peak = gpus.peak_flops(engine.device)
        if self.peak:  # counted on the full model, of which a rank may hold a shard
            full = build_empty_model(config)
            self.flops = flops_per_token(full, config.seq_length)
        self.skipped_in_a_row = 0
        self.reset()

    def reset(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.grad_norms: list[torch.Tensor] = []
        self.shares: list[torch.Tensor] = []
        self.valid = 0
        self.started = time.perf_counter()

    def add(self, batch: list[dict], loss: torch.Tensor, grad_norm: torch.Tensor):
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.shares.append(getattr(self.engine, "share", loss))
        self.valid += data.valid_tokens(batch)  # labels are on the CPU: no device sync

    def log(self, step: int, learning_rate: float, loader: data.BatchLoader) -> None:
        """Record the steps since the last record; every rank must call it.

        Raises:
            NonFiniteError: a loss or a gradient norm is infinite or NaN.
            DriftError: copies of a weight differ between ranks.
        """
        losses, norms = torch.stack(self.losses), torch.stack(self.grad_norms)
        finite = losses.isfinite() & norms.isfinite()
        if finite.all():  # the only wait for the device
            self.skipped_in_a_row = 0
        else:
            self.handle_non_finite(step, losses, norms, loader)
            losses = losses[finite] if finite.any() else losses
            norms = norms[finite] if finite.any() else norms
        health.check_replicas(self.engine, step)
        loss, grad_norm = losses.mean().item(), norms[-1].item()
        seconds = time.perf_counter() - self.started
        valid, memory = self.over_ranks()
        record = {
            "step": step,
            "position": loader.position,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": valid / seconds,
            "step_time": seconds / len(self.losses),
            "peak_memory": memory,
        }
        if self.peak:
            rows = len(self.losses) * self.config.global_batch_size
            tokens = loader.tokens_in(loader.position - rows, rows)
            done = tokens * self.flops / seconds
            record["mfu"] = done / self.peak / dist.get_world_size()
        self.history.append(record)
        if self.writer:
            for key in record.keys() - {"step", "position"}:
                self.writer.add_scalar(f"train/{key}", record[key], step)
        self.publish(record)
        self.reset()

    def handle_non_finite(self, step: int, losses, norms, loader) -> None:
        """Stop, or with ``nonfinite="skip"`` tell which steps changed no weight."""
        first = step - len(losses) + 1
        for at, loss, norm, share in zip(
            range(first, step + 1),
            losses.tolist(),
            norms.tolist(),
            self.shares,
            strict=True,
        ):
            if math.isfinite(loss) and math.isfinite(norm):
                self.skipped_in_a_row = 0
                continue
            self.skipped_in_a_row += 1
            if math.isfinite(loss) and self.config.dtype == "float16":
                told = f"step {at} overflowed and was skipped: the loss scale is halved"
            else:
                back = (step + 1 - at) * self.config.global_batch_size
                rows = loader.share_at(loader.position - back)
                told = health.describe_step(
                    at, loss, norm, share, rows, self.engine.mesh
                )
                if self.config.nonfinite == "stop":
                    raise health.NonFiniteError(
                        f"{told}; both must be finite: try a lower learning_rate, or "
                        "nonfinite='skip' to leave such steps out"
                    )
                told += "; skipped"
            self.publish({"notice": told})
        if self.skipped_in_a_row >= health.MAX_SKIPPED:
            raise health.NonFiniteError(
                f"{told}, the last of {self.skipped_in_a_row} in a row; steps must be "
                "finite again before that: try a lower learning_rate"
            )

    def log_own(self, step: int, numbers: dict[str, float] | None) -> None:
        """Add what a user's own function returned after a step to TensorBoard."""
        if self.writer:
            for key, value in (numbers or {}).items():
                self.writer.add_scalar(f"own/{key}", value, step)

    def log_eval(self, step: int, loss: float) -> None:
        """Add a validation loss to the record of a step that was just logged."""
        self.history[-1]["eval_loss"] = loss
        if self.writer:
            self.writer.add_scalar("eval/loss", loss, step)
        self.publish({"step": step, "eval_loss": loss})
        self.reset()

    def over_ranks(self) -> tuple[int, int]:
        """Valid tokens over all dp ranks; the largest peak memory of any rank."""
        valid = torch.tensor(int(self.valid), device=self.engine.device)
        dist.all_reduce(valid, group=self.engine.mesh["dp"].get_group())
        memory = torch.tensor(
            peak_memory(self.engine.device), device=self.engine.device
        )
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        return int(valid), int(memory)

    def upload(self) -> None:
        """Send to a store what is in the event files so far."""
        if self.writer and self.local != self.events:
            self.writer.flush()
            for name in store.files(self.local):
                store.copy(self.local / name, self.events / name)

    def close(self) -> None:
        if self.writer:
            self.upload()
            self.writer.close()
            if self.local != self.events:
                store.remove_tree(self.local)
