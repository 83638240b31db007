"""Train a language model on a mesh of dp x tp ranks, with FSDP2 and DTensor.

One file to copy. It needs ray[train], torch and transformers:
    python fsdp2_2d.py model_name=Qwen/Qwen2.5-0.5B dataset=train.jsonl tp_size=2
Run it again with a larger max_steps, on this mesh or another one, and it goes on.

Left out, and where tp2d_lib has it: chats, packing, the Hub's data (data/); a schedule,
accumulation, evaluation (run/); weights that no rank holds whole, plans
with gaps (fsdp/); sliding windows, logits in chunks, recomputation, export (model/);
checksums, stores (checkpoint/); hangs, NaN (run/).
"""

import hashlib
import json
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import ray
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import parallel as tp
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DEFAULTS = {"model_name": "Qwen/Qwen2.5-0.5B", "dataset": "train.jsonl"}
DEFAULTS |= {"tp_size": 1, "dp_size": 1, "batch_size_per_gpu": 1, "seq_length": 512}
DEFAULTS |= {"max_steps": 100, "learning_rate": 1e-5, "checkpoint_every": 50}
DEFAULTS |= {"seed": 42, "run_name": "fsdp2-2d", "storage_path": "runs"}
IGNORED = -100  # the label of padding


def tensor_parallel_plan(model) -> dict:
    """Each module's style, from the model's own plan; ``part``: of the positions."""
    whole, part, local = Replicate(), Shard(1), {"use_local_output": True}
    logits = {"output_layouts": Shard(-1), "use_local_output": False}
    styles = {
        "colwise": tp.ColwiseParallel(),
        "rowwise": tp.RowwiseParallel(output_layouts=part),
        "norm": tp.SequenceParallel(**local),
        "replicated_with_grad_allreduce": tp.SequenceParallel(sequence_dim=2, **local),
        "embedding": tp.RowwiseParallel(input_layouts=whole, output_layouts=part),
        "head": tp.ColwiseParallel(input_layouts=part, **logits),
        "mlp": tp.PrepareModuleInput(input_layouts=part, desired_input_layouts=whole),
        "self_attn": tp.PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": part},
            desired_input_kwarg_layouts={"hidden_states": whole},
        ),
    }
    ends = {model.get_input_embeddings(): "embedding"}
    ends[model.get_output_embeddings()] = "head"
    plan, published = {}, model.tp_plan or {}
    for name, module in model.named_modules():
        style = ends.get(module) or published.get(re.sub(r"\.\d+", ".*", name))
        if style is None and type(module).__name__.endswith("Norm"):
            style = "norm"
        if style in styles:
            plan[name] = styles[style]
        if style == "colwise":  # its block gathers the positions, once
            block = name.rpartition(".")[0]
            plan[block] = styles["self_attn" if block.endswith("attn") else "mlp"]
    for name, _ in model.named_parameters():
        if name.rpartition(".")[0] not in plan:
            sys.exit(f"the tp_plan of model_name must cover {name}; try tp_size=1")
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        sys.exit("model_name must not have sliding windows; try tp_size=1")
    return plan


class Engine:
    """A model on this rank of the mesh: float32 weights, bfloat16 computing on GPUs."""

    def __init__(self, config, mesh, device: torch.device, optimizer=torch.optim.AdamW):
        model = AutoModelForCausalLM.from_pretrained(config.model_name, dtype="float32")
        self.mesh, self.device, self.model = mesh, device, model.to(device).train()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = embedding.weight is head.weight
        if config.tp_size > 1:
            tp.parallelize_module(model, mesh["tp"], tensor_parallel_plan(model))
        if is_tied:  # it has made two parameters of one
            head.weight = embedding.weight
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32)
        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=mesh["dp"], mp_policy=policy)
        self.optimizer = optimizer(model.parameters(), config.learning_rate)

    def step(self, rows: np.ndarray) -> float:
        """One update by this dp rank's rows, (batch, seq) token ids with -100 for
        padding; returns the loss, a mean over the valid tokens of all dp ranks."""
        dp, labels = self.mesh.get_group("dp"), torch.from_numpy(rows).to(self.device)
        valid = (labels[:, 1:] != IGNORED).sum()
        dist.all_reduce(valid, group=dp)
        positions = torch.arange(rows.shape[1], device=self.device)[None]  # all of them
        inputs = {"input_ids": labels.clamp(min=0), "position_ids": positions}
        inputs |= {"labels": labels, "num_items_in_batch": valid, "use_cache": False}
        with tp.loss_parallel():  # the logits of a rank are those of its vocabulary
            loss = self.model(**inputs).loss
            (loss * dp.size()).backward()  # FSDP averages over dp; we need the sum
        loss = (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach()
        dist.all_reduce(loss, group=dp)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, folder: str) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        state = {"model_state_dict": model, "optim_state_dict": optimizer}
        set_state_dict(self.model, self.optimizer, **state)


def train(given: dict) -> None:
    """What every rank runs; its rows depend on seed, step and dp rank alone."""
    config, rows = given["config"], ray.get(given["rows"])
    device, shape = get_device(), (config.dp_size, config.tp_size)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))
    engine, step, position = Engine(config, mesh, device), 0, 0
    if checkpoint := ray.train.get_checkpoint():
        step, position = checkpoint.get_metadata()["done"]
        with checkpoint.as_directory() as folder:
            engine.load(folder)
    dp_rank, size = mesh["dp"].get_local_rank(), config.batch_size_per_gpu
    count, seed = len(rows), config.seed
    order = lru_cache(2)(lambda n: np.random.default_rng([seed, n]).permutation(count))
    while step < config.max_steps:
        torch.manual_seed(hash((seed, step, dp_rank)))  # for dropout
        samples = position + dp_rank * size + np.arange(size)
        loss = engine.step(rows[[order(n // count)[n % count] for n in samples]])
        step, position = step + 1, position + config.dp_size * size
        if dist.get_rank() == 0:
            sys.stdout.write(f"step {step} loss {loss:.6f}\n")  # Ray repeats print
        if step % config.checkpoint_every == 0 or step == config.max_steps:
            with tempfile.TemporaryDirectory() as folder:  # of this rank's part
                engine.save(folder)
                checkpoint = Checkpoint.from_directory(folder)
                checkpoint.set_metadata({"done": [step, position]})
                ray.train.report({"step": step, "loss": loss}, checkpoint=checkpoint)


def prepare(config) -> np.ndarray:
    """Documents one after another, cut into rows; the last row has padding."""
    tokenizer, ids = AutoTokenizer.from_pretrained(config.model_name), []
    for line in filter(str.strip, Path(config.dataset).read_text("utf-8").split("\n")):
        ids += tokenizer(json.loads(line)["text"])["input_ids"]
        ids.append(tokenizer.eos_token_id)
    rows = np.full((-(-len(ids) // config.seq_length), config.seq_length), IGNORED)
    rows.reshape(-1)[: len(ids)] = ids
    return rows[rows[:, 1] != IGNORED]  # one token has nothing to predict


def check(config, rows: np.ndarray, folder: Path) -> None:
    """Refuse what cannot be sharded or resumed, before any rank starts."""
    architecture = AutoConfig.from_pretrained(config.model_name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    if config.tp_size > 1:
        tensor_parallel_plan(model)
    for size in (architecture.num_key_value_heads, config.seq_length):
        if size % config.tp_size:
            sys.exit(f"tp_size={config.tp_size} must divide {size}; try tp_size=1")
    folder.mkdir(parents=True, exist_ok=True)
    about, file = [config.seed, hashlib.sha256(rows).hexdigest()], folder / "rows.json"
    if file.exists() and json.loads(file.read_text()) != about:
        sys.exit(f"{folder} has a run with other rows or seed; try another run_name")
    file.write_text(json.dumps(about))


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if unknown := given.keys() - DEFAULTS.keys():
        sys.exit(f"{unknown} must be some of {', '.join(DEFAULTS)}, as name=value")
    given = {name: type(DEFAULTS[name])(value) for name, value in given.items()}
    config = SimpleNamespace(**DEFAULTS | given)
    rows, storage = prepare(config), str(Path(config.storage_path).resolve())
    check(config, rows, Path(storage, config.run_name))
    ray.init(ignore_reinit_error=True)
    ranks, has = config.dp_size * config.tp_size, ray.cluster_resources()
    share = {"CPU": min(1, int(100 * has["CPU"] / ranks) / 100)}  # of what there is
    needs = {"use_gpu": "GPU" in has, "resources_per_worker": share}
    TorchTrainer(
        train,
        train_loop_config={"config": config, "rows": ray.put(rows)},
        scaling_config=ScalingConfig(num_workers=ranks, **needs),
        run_config=RunConfig(config.run_name, storage, failure_config=FailureConfig(3)),
    ).fit()
