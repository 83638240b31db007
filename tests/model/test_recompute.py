"""Recomputed activations give the same gradients, bit for bit, or an error."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tests.support.models import CONFIGS, OTHERS, write_model
from tp2d_lib.config import TrainConfig
from tp2d_lib.model import PlanError, checkpoint_activations

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


class Operators(TorchDispatchMode):
    """Count the matrix products of a backward pass, and its attentions."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        attends = "attention" in func.__name__ and "backward" not in func.__name__
        self.count["attention"] += attends
        self.count["products"] += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def build(path: str, kind: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path).train()
    config = TrainConfig(model_name=path, activation_checkpointing=kind)
    checkpoint_activations(model, config)
    return model


def gradients(model) -> tuple[dict, Counter]:
    ids = torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with Operators() as operators:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, operators.count


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_the_same_gradients_for_fewer_operators(name, tmp_path):
    path = write_model(name, tmp_path)
    (plain, none), (cheap, selective), (same, full) = (
        gradients(build(path, kind)) for kind in ("none", "selective", "full")
    )
    for key, expected in plain.items():
        assert torch.equal(cheap[key], expected), key
        assert torch.equal(same[key], expected), key
    assert none["products"] <= selective["products"] < full["products"]
    assert none["attention"] == selective["attention"] <= full["attention"]


def test_what_is_kept_must_not_be_written_over(tmp_path):
    """PyTorch would add this bias twice, and say nothing."""
    model = build(write_model("qwen2-tied", tmp_path), "selective")
    query = model.model.layers[0].self_attn.q_proj

    def write_over(x):
        out = x @ query.weight.T
        out += query.bias
        return out

    query.forward = write_over
    with pytest.raises(PlanError, match="works only with models that do not write ov"):
        gradients(model)
