"""From how many logits on the loss is computed in chunks, and how large these are."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.decoders import tiny
from tp2d_lib.config import TrainConfig
from tp2d_lib.model.chunks import chunk_tokens, compute_loss_in_chunks


def test_many_logits_are_computed_in_chunks(tmp_path):
    config = TrainConfig(
        tp_size=2,
        dp_size=1,
        batch_size_per_gpu=8,
        seq_length=128,
        device="cpu",
        storage_path=str(tmp_path),
    )
    few, many = 2**13, 2**13 + 2  # of them 512 x vocabulary on each of two ranks
    assert chunk_tokens(config, few) == 0
    assert chunk_tokens(config, many) == 256
    whole = replace(config, vocab_parallel_lm_head=False)  # AutoTP: all on each rank
    assert chunk_tokens(whole, few) == 256
    assert chunk_tokens(replace(config, device="cuda"), many) == 1024
    assert chunk_tokens(replace(config, dtype="float16"), many) == 0
    assert chunk_tokens(replace(config, loss_chunk_tokens=0), many) == 0
    assert chunk_tokens(replace(config, loss_chunk_tokens=7), few) == 7


@pytest.mark.parametrize(
    "name",
    [
        "bert",  # a head of several layers
        "falcon_h1",  # which scales the decoder's output by an attribute of it
        "gemma4_text",  # whose forward looks at its inputs
        "llama4_text",  # get_decoder() returns the whole model
        "opt",  # whose head works on a part of its only child
        "mixtral",  # whose decoder returns more than hidden states
    ],
)
def test_chunks_have_the_gradients_of_the_whole(name, tmp_path):
    tiny.write(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ids = torch.arange(2 * 16).view(2, 16) * 7 % 500
    given = {"input_ids": ids, "labels": ids, "use_cache": False}
    given["num_items_in_batch"] = torch.tensor(30)
    found = []
    for chunk in (0, 12):
        config = TrainConfig(
            model_name=str(tmp_path),
            batch_size_per_gpu=2,
            seq_length=16,
            loss_chunk_tokens=chunk,
            device="cpu",
        )
        compute_loss_in_chunks(model, config)
        loss = model(**given).loss
        loss.backward()
        named = model.named_parameters()
        found.append({k: p.grad for k, p in named if p.grad is not None})
        found[-1]["loss"] = loss.detach()
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for key, whole in found[0].items():
        torch.testing.assert_close(found[1][key], whole, rtol=1e-4, atol=1e-5)
