"""Parameter groups and AdamW's settings, as in one process."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.support.models import write_model
from tests.support.parity import (
    MAX_GRAD_NORM,
    assert_weights_equal,
    make_config,
    make_steps,
    share_of,
)
from tests.support.reference import LOST
from tp2d_lib.model.chunks import compute_loss_in_chunks

OWN = {"weight_decay": 0.5, "decay": "matrices"}
ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
VARIANT = ("padded", 2, "adamw")


def train_reference(path: str, variant: tuple) -> tuple:
    """Losses, norms and weights of one process; see ``reference.train``."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": OWN["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if variant[2] == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.5)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), eps=1e-6)
    losses, norms = [], []
    settled = {name: torch.ones_like(p).bool() for name, p in model.named_parameters()}
    for step in make_steps(*variant[:2]):
        valid = sum((labels[:, 1:] != -100).sum() for _, labels in step)
        total = 0.0
        for ids, labels in step:
            mask = (labels != -100).long()
            logits = model(ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
            targets = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits, targets, reduction="sum") / valid
            loss.backward()
            total += loss.item()
        losses.append(total)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        norms.append(norm.item())
        for name, p in model.named_parameters():
            size = p.grad.abs()
            settled[name] &= (size == 0) | (size > LOST * size.max())
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name, weight in weights.items():
        weight.settled = settled[name] | (variant[2] == "sgd")
    return losses, norms, weights


def train(engine: str, config, folder: str, start: str | None = None):
    """Run by every rank: the steps, or those after a checkpoint, and the export."""
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    steps = make_steps(VARIANT[0], config.gradient_accumulation_steps)
    batches = share_of(steps, mesh, config.batch_size_per_gpu)
    half = len(batches) // 2
    if start:
        built.load(start)
        batches = batches[half:]
    figures = []
    for number, batch in enumerate(batches):
        if number == half and not start:
            built.save(f"{folder}/checkpoint")
        figures.append(tuple(map(float, built.step(batch))))
    built.export(f"{folder}/export")
    groups = built.optimizer.param_groups
    return figures, [(group["weight_decay"], group.get("betas")) for group in groups]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model("qwen3", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_equal_to_one_process(engine, chunk, model, pools, tmp_path):
    ranks = pools(4, engine)
    variant = VARIANT if chunk else ("padded", 1, "sgd")
    own = OWN | (ADAM if chunk else {})
    config = make_config(
        model, str(tmp_path), 2, 2, variant, loss_chunk_tokens=chunk, **own
    )
    losses, norms, weights = train_reference(model, variant)
    for figures, decays in ranks.run(train, engine, config, str(tmp_path)):
        got = tuple(zip(*figures, strict=True))
        torch.testing.assert_close(list(got[0]), losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(list(got[1]), norms, rtol=1e-4, atol=0)
        assert [decay for decay, _ in decays] == [0.5, 0.0]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert_weights_equal(dict(exported.named_parameters()), weights)
    if not chunk:
        return
    # The second half again: exactly on the same mesh, and on another one.
    start = str(tmp_path / "checkpoint")
    for figures, _ in ranks.run(train, engine, config, str(tmp_path / "again"), start):
        assert list(zip(*figures, strict=True)) == [each[2:] for each in got]
    other = replace(config, tp_size=1, num_workers=None, batch_size_per_gpu=2)
    other = replace(other, adam_beta2=0.9)  # of little effect in so few steps
    folder = str(tmp_path / "other")
    for figures, groups in pools(2, engine).run(train, engine, other, folder, start):
        for before, after in zip(got, zip(*figures, strict=True), strict=True):
            torch.testing.assert_close(list(after), list(before[2:]), rtol=1e-2, atol=0)
        assert groups == [(0.5, (0.8, 0.9)), (0.0, (0.8, 0.9))]


def test_zero_3_goes_on_with_two_groups_on_another_mesh(model, pools, tmp_path):
    """Converted, each part of the weights has its own count of steps."""
    own = OWN | ADAM | {"zero_stage": 3}
    config = make_config(model, str(tmp_path), 2, 2, VARIANT, **own)
    whole, _ = pools(4, "autotp").run(train, "autotp", config, str(tmp_path))[0]
    start, folder = str(tmp_path / "checkpoint"), str(tmp_path / "other")
    other = replace(config, tp_size=1, num_workers=None, batch_size_per_gpu=2)
    ((half, groups), _) = pools(2, "autotp").run(train, "autotp", other, folder, start)
    torch.testing.assert_close(half, whole[2:], rtol=1e-5, atol=0)
    assert [decay for decay, _ in groups] == [0.5, 0.0]
    first, second = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (tmp_path / "export", folder + "/export")
    )
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-5)


def test_a_frozen_head_is_computed_in_chunks(model, tmp_path):
    config = make_config(model, str(tmp_path), 1, 1, VARIANT, loss_chunk_tokens=8)
    ids = torch.arange(2 * 32).view(2, 32)
    inputs = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(62)}
    gradients = []
    for chunk in (config, replace(config, loss_chunk_tokens=0)):
        built = AutoModelForCausalLM.from_pretrained(model)
        built.lm_head.requires_grad_(False)
        compute_loss_in_chunks(built, replace(chunk, batch_size_per_gpu=2))
        built(**inputs).loss.backward()
        gradients.append(built.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*gradients)
