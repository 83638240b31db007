"""From how many logits on the loss is computed in chunks, and how large these are."""

from dataclasses import replace

from tp2d_lib.config import TrainConfig
from tp2d_lib.model.chunks import chunk_tokens


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
