"""Train a language model on a mesh of dp x tp ranks, with DeepSpeed AutoTP and ZeRO.

One file to copy. It needs ray[train], torch, transformers and deepspeed:
    python autotp_2d.py model_name=Qwen/Qwen2.5-0.5B dataset=train.jsonl tp_size=2
Run it again with a larger max_steps, on the same mesh, and it goes on.

Left out, and where tp2d_lib has it: chats, packing, the Hub's data (data/); a schedule,
accumulation, evaluation (run/); your own sharding rules, untied
embeddings sharded, ZeRO 0, 2 and 3, another mesh (autotp/); logits in chunks,
recomputation, export (model/); checksums, stores (checkpoint/); hangs, NaN (run/).
"""

import hashlib
import json
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import ray
import torch
import torch.distributed as dist
from deepspeed import ops as operators
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DEFAULTS = {"model_name": "Qwen/Qwen2.5-0.5B", "dataset": "train.jsonl"}
DEFAULTS |= {"tp_size": 1, "dp_size": 1, "batch_size_per_gpu": 1, "seq_length": 512}
DEFAULTS |= {"max_steps": 100, "learning_rate": 1e-5, "checkpoint_every": 50}
DEFAULTS |= {"seed": 42, "run_name": "autotp-2d", "storage_path": "runs"}
IGNORED = -100  # the label of padding


def check_plan(model) -> None:
    """DeepSpeed shards by the model's own plan, and would leave whole what has none."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in model.named_modules():
        is_matrix = isinstance(module, torch.nn.Linear) and module not in ends
        if is_matrix and re.sub(r"\.\d+", ".*", name) not in (model.tp_plan or {}):
            sys.exit(f"the tp_plan of model_name must cover {name}; try tp_size=1")


def deepspeed_config(config, half: bool) -> dict:
    sharded = {
        "autotp_size": config.tp_size,
        "vocab_parallel_lm_head": config.tp_size > 1,
    }
    return {
        "train_micro_batch_size_per_gpu": config.batch_size_per_gpu,
        "gradient_clipping": 1.0,
        "tensor_parallel": sharded,
        "zero_optimization": {"stage": 1},  # in bfloat16 stage 0 clips by another norm
        "bf16": {"enabled": half},  # with float32 masters
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # torch's own
        "steps_per_print": 10**9,
    }


class Engine:
    """A model on this rank of the mesh: float32 weights, bfloat16 computing on GPUs."""

    def __init__(self, config, mesh, device: torch.device, optimizer=torch.optim.AdamW):
        self.mesh, self.device = mesh, device
        if device.type == "cpu":  # else it compiles an operator, with a C++ compiler
            operators.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)  # there is a process group
        model = AutoModelForCausalLM.from_pretrained(config.model_name, dtype="float32")
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        self.engine, *_ = deepspeed.initialize(
            model=model.train(),
            optimizer=optimizer(model.parameters(), config.learning_rate),
            config=deepspeed_config(config, half),
        )

    def step(self, rows: np.ndarray) -> float:
        """One update by this dp rank's rows, (batch, seq) token ids with -100 for
        padding; returns the loss, a mean over the valid tokens of all dp ranks."""
        dp, labels = self.mesh.get_group("dp"), torch.from_numpy(rows).to(self.device)
        valid = (labels[:, 1:] != IGNORED).sum()
        dist.all_reduce(valid, group=dp)
        inputs = {"input_ids": labels.clamp(min=0), "labels": labels}
        loss = self.engine(**inputs, num_items_in_batch=valid, use_cache=False).loss
        self.engine.backward(loss * dp.size())  # it averages over dp; we need the sum
        self.engine.step()  # clips, too
        loss = loss.detach()
        dist.all_reduce(loss, group=dp)
        return loss.item()

    def save(self, folder: str) -> None:
        self.engine.save_checkpoint(folder, tag="state")

    def load(self, folder: str) -> None:
        self.engine.load_checkpoint(folder, tag="state")


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
        check_plan(model)
    for size in (architecture.num_key_value_heads, config.seq_length):
        if size % config.tp_size:
            sys.exit(f"tp_size={config.tp_size} must divide {size}; try tp_size=1")
    folder.mkdir(parents=True, exist_ok=True)
    about, file = [config.seed, hashlib.sha256(rows).hexdigest()], folder / "rows.json"
    about += [config.tp_size, config.dp_size]
    if file.exists() and json.loads(file.read_text()) != about:
        sys.exit(f"{folder} has a run with other rows, seed or mesh; try another name")
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
