"""Attention without a mask computes what the model's own attention does."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from tests.decoders import tiny
from tests.support.models import CONFIGS, FAMILIES, OTHERS, write_model
from tp2d_lib.config import TrainConfig
from tp2d_lib.model.attention import (
    CAUSAL,
    VARLEN,
    attend_causally,
    attend_within_documents,
    document_starts,
    flash_fits,
    model_inputs,
)

SEQ = 32
WINDOWS = {"gemma3", "mistral"}  # gemma2 attends eagerly
ON_GPU = {"pack": "documents", "device": "cuda"}


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
    masks = name == "doge" or (bool(settings) and window < SEQ)
    without_mask = model.config._attn_implementation == CAUSAL
    assert without_mask == (sdpa and not masks)


def test_documents_start_where_positions_do():
    """Of two rows: documents of 3 and 5 tokens, and of 1, 2 and 5."""
    lengths = [3, 5, 1, 2, 5]
    positions = torch.cat([torch.arange(length) for length in lengths])
    starts, longest = document_starts(positions.view(2, 8))
    assert starts.tolist() == [0, 3, 8, 9, 11, 16]
    assert starts.dtype == torch.int32
    assert longest == 8


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        (ON_GPU, True),
        (ON_GPU | {"pack": "stream"}, False),
        (ON_GPU | {"device": "cpu"}, False),
        (ON_GPU | {"dtype": "float32"}, False),  # FlashAttention has no kernel for it
        (ON_GPU | {"dtype": "float32", "autocast": True}, True),
        (ON_GPU | {"attn_implementation": "sdpa"}, False),
    ],
)
def test_flash_attention_is_for_packed_documents_on_gpus(settings, fits, tmp_path):
    path = write_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert flash_fits(model, TrainConfig(model_name=path, **settings)) == fits
    for name in ("attention_dropout", "attn_pdrop"):  # the kernel has none
        setattr(model.config, name, 0.1)
        assert not flash_fits(model, TrainConfig(model_name=path, **settings))
        setattr(model.config, name, 0.0)


def test_heads_of_several_sizes_do_not_fit(tmp_path):
    tiny.write("gemma4_text", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not flash_fits(model, TrainConfig(model_name=str(tmp_path), **ON_GPU))


def test_rows_without_positions_are_one_document_each():
    """Held-out text is packed as a stream, also where conversations are trained on."""
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=VARLEN))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    inputs = model_inputs(model, {"input_ids": ids, "labels": ids}, torch.device("cpu"))
    assert inputs["cu_seq_lens_q"].tolist() == [0, 8, 16]
    assert inputs["max_length_q"] == 8
    assert "position_ids" not in inputs


def test_flash_attention_is_given_one_type():
    """Under autocast query and key come as float32, the value does not."""
    with FakeTensorMode():  # the kernel's own rules, on a machine without a GPU
        query = torch.randn(2, 4, 8, 16)
        key = torch.randn(2, 2, 8, 16)
        starts = torch.zeros(3, dtype=torch.int32)
        given = {"cu_seq_lens_q": starts, "max_length_q": 8, "attention_mask": None}
        out, _ = attend_within_documents(None, query, key, key.bfloat16(), **given)
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, 8, 4, 16)  # as transformers expects it
