"""What the net asks of processes that may die: each function runs in one of its own."""

import re
import shutil
from ast import literal_eval
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.decoders import tiny
from tests.support import lora, reference
from tests.support.parity import MAX_GRAD_NORM, make_config, make_steps, share_of
from tp2d_lib.config import ConfigError
from tp2d_lib.fsdp import plan
from tp2d_lib.model import PlanError, attention, build_empty_model
from tp2d_lib.model.lora import adapters

VARIANT = ("padded", 1, "sgd")
STEPS = 2
RANK, SCALE = 3, 2.0  # of adapters
ALL = plan.SMALLEST_GROUP
KEPT = (
    "tp_size",
    "dp_size",
    "weight_decay",
    "lora_rank",
)  # the reference has them, too
RECOMPUTED = {("fsdp", 2), ("lora", 2), ("autotp", 1)}  # engine and tp_size
SENTENCE = r"[^\n]+ (?:must|works|cannot) [^\n]+; try [^\n]+"


def steps_of() -> list:
    return make_steps(*VARIANT[:2])[:STEPS]


def prepare(name: str, folder: Path) -> str:
    """Write the tiny model and what one process makes of it; its own class's name."""
    tiny.write(name, folder / "model")
    trained = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        one = reference.train(folder / "model", "sgd", steps_of(), MAX_GRAD_NORM)
        trained.append(one)
    if trained[0][0] != trained[1][0]:
        raise ValueError("its losses are random")
    torch.save(trained[0], folder / "fsdp.pt")
    torch.save(trained[0], folder / "autotp.pt")
    with suppress(ConfigError):  # no layer can have an adapter
        empty = build_empty_model(make_config_of(folder, 1, 1, lora_rank=RANK))
        names = [name for name, _ in adapters(empty)]
        options = ("sgd", steps_of(), MAX_GRAD_NORM)
        adapt = partial(lora.add, names=names, rank=RANK, scale=SCALE)
        one = reference.train(folder / "model", *options, adapt=adapt)
        merged = lora.merged(one[2], SCALE)
        torch.save((*one[:2], merged), folder / "lora.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    return type(model).__name__


def without_mask(folder: Path) -> str:
    """How attention without a mask differs from the model's own; "" if not at all."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = steps_of()[0][0][0]
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        attention.attend_causally(model, make_config_of(folder, 1, 1))
        now = model(input_ids=ids, use_cache=False).logits
    apart = (now - own).abs().max() / own.abs().max()
    taken = model.config._attn_implementation == attention.CAUSAL
    if apart > 1e-5:
        return f"logits differ by {apart:.2g} without a mask"
    return "taken" if taken else ""


def make_config_of(folder: Path, tp_size: int, dp_size: int, **settings):
    path = str(folder / "model")
    settings["loss_chunk_tokens"] = 24  # so that the last chunk is smaller
    return make_config(path, str(folder), tp_size, dp_size, VARIANT, **settings)


def accept(engine: str, folder: Path, tp_size: int, dp_size: int):
    """A configuration that the driver accepts, and the setting it took; or a sentence.

    Where it refuses the default, the value that it tells to try must do.
    """
    check = module_of(engine).check
    more = {"lora_rank": RANK, "merge_adapter": True} if engine == "lora" else {}
    more["export_to"] = str(folder / f"{engine}-{tp_size}")
    config = make_config_of(folder, tp_size, dp_size, **more)
    if (engine, tp_size) in RECOMPUTED:
        config = replace(config, activation_checkpointing="full")
    setting = ""
    for _ in range(2):
        try:
            return check(config), setting
        except (ConfigError, PlanError) as error:
            said = str(error)
        if not re.fullmatch(SENTENCE, said):
            return None, f"not a sentence: {said}"
        found = re.search(r"; .*try (?:\w+ )*(\w+)=([\w']+)$", said)
        if setting or not found or found[1] in KEPT:
            break
        setting = f"{found[1]}={found[2]}"
        config = replace(config, **{found[1]: literal_eval(found[2])})
    return None, said.replace(str(folder / "model"), "MODEL")


def module_of(engine: str):
    return import_module(f"tp2d_lib.{'fsdp' if engine == 'lora' else engine}")


def train(engine: str, config) -> tuple[list, float]:
    """Run by every rank: losses and norms, and how far attention looks ahead."""
    from tp2d_lib.mesh import build_mesh

    # Each layer by itself, as in a model of a usual size, or all at once.
    plan.SMALLEST_GROUP = 1 if engine == "fsdp" else ALL
    mesh = build_mesh(config.dp_size, config.tp_size)
    built = module_of(engine).build_engine(config, mesh)
    ahead = looks_ahead(built, config)
    batches = share_of(steps_of(), mesh, config.batch_size_per_gpu)
    trained = [tuple(map(float, built.step(batch))) for batch in batches]
    built.export(config.export_to)
    return trained, ahead


@torch.no_grad()
def looks_ahead(engine, config) -> float:
    """How much the last token changes the loss of those before it, relatively."""
    ids = steps_of()[0][0][0][: config.batch_size_per_gpu].clone()
    labels = ids.clone()
    labels[:, -1] = attention.IGNORED
    losses = []
    engine.model.eval()
    for _ in range(2):
        losses.append(float(engine.summed_loss({"input_ids": ids, "labels": labels})))
        ids[:, -1] = (ids[:, -1] + 100) % 500
    engine.model.train()
    return abs(losses[1] - losses[0]) / losses[0]


def compare(engine: str, folder: Path, config, answers: list) -> str:
    """What differs from one process: losses, norms, weights; "" if nothing does."""
    file = folder / f"{engine}.pt"
    losses, norms, weights = torch.load(file, weights_only=False)
    for trained, ahead in answers:
        got = torch.tensor(trained, dtype=torch.float64).T
        for what, ours, theirs, rtol in (
            ("losses", got[0], losses, 1e-5),
            ("norms", got[1], norms, 1e-4),
        ):
            theirs = torch.tensor(theirs, dtype=torch.float64)
            if not torch.allclose(ours, theirs, rtol=rtol, atol=0):
                return f"{what} {ours.tolist()} instead of {theirs.tolist()}"
        if not ahead <= 1e-5:
            return f"the last token changes the loss before it by {ahead:.2g}"
    exported = AutoModelForCausalLM.from_pretrained(config.export_to)
    named = dict(exported.named_parameters())
    shutil.rmtree(config.export_to)
    if named.keys() != weights.keys():
        return f"exported weights differ in {named.keys() ^ weights.keys()}"
    apart = {k: (named[k] - w).abs().max().item() for k, w in weights.items()}
    worst = max(apart, key=apart.get)
    return "" if apart[worst] <= 1e-4 else f"{worst} is {apart[worst]:.2g} away"
