"""Attention without a mask computes what the model's own attention does."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.models import CONFIGS, FAMILIES, OTHERS, write_model
from tp2d_lib.config import TrainConfig
from tp2d_lib.model.attention import CAUSAL, attend_causally

SEQ = 32
WINDOWS = {"gemma3", "mistral"}  # gemma2 attends eagerly


@pytest.mark.parametrize("window", [SEQ // 2, SEQ])
@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS, *FAMILIES])
def test_same_loss(name, window, tmp_path):
    settings = {"sliding_window": window} if name in WINDOWS else {}
    path = write_model(name, tmp_path, initializer_range=0.2, **settings)
    model = AutoModelForCausalLM.from_pretrained(path)
    sdpa = model.config._attn_implementation == "sdpa"
    ids = torch.randint(500, (2, SEQ))
    expected = model(input_ids=ids, labels=ids).loss
    attend_causally(model, TrainConfig(model_name=path, seq_length=SEQ))
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
    masks = bool(settings) and window < SEQ
    without_mask = model.config._attn_implementation == CAUSAL
    assert without_mask == (sdpa and not masks)
