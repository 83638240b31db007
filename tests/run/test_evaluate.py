"""The validation loss: every held-out token counts once, on every mesh the same."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.chats import write_chat_model
from tests.support.texts import sentences, write_lines, write_texts
from tp2d_lib import data
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.run import evaluate, health

HELD_OUT = [*sentences(40), "word " * 300]  # one document longer than a row
SEQ = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory, demo_paths):
    folder = tmp_path_factory.mktemp("held-out")
    model_name, dataset_name = demo_paths
    config = TrainConfig(
        model_name=model_name,
        dataset_name=dataset_name,
        eval_dataset=write_texts(folder / "texts", HELD_OUT, split="test"),
        eval_split="test",
        eval_every=1,
        seq_length=SEQ,
        batch_size_per_gpu=3,  # does not divide the rows
        storage_path=str(folder),
    )
    return config


def tokens_of(config) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    ids = tokenizer(HELD_OUT)["input_ids"]
    return [[*document, tokenizer.eos_token_id] for document in ids]


def rows_of(config) -> list[list[int]]:
    """What must be read: all tokens, split by hand."""
    documents = tokens_of(config)
    if config.pack == "stream":
        documents = [[token for document in documents for token in document]]
    return [
        document[start : start + SEQ]
        for document in documents
        for start in range(0, len(document), SEQ)
    ]


@torch.no_grad()
def expected_loss(config) -> float:
    """One process, one row at a time, nothing padded."""
    model = AutoModelForCausalLM.from_pretrained(config.model_name)
    total, count = 0.0, 0
    for row in rows_of(config):
        if len(row) > 1:
            ids = torch.tensor([row])
            logits = model(ids).logits[0, :-1]
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(row) - 1
    return total / count


def untied(config, folder) -> str:
    """The model with an embedding and a head of their own."""
    path = shutil.copytree(config.model_name, folder / "untied")
    tied = AutoModelForCausalLM.from_pretrained(path)
    hf = AutoConfig.from_pretrained(path, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(hf)
    model.load_state_dict(tied.state_dict())
    model.lm_head.weight.data.mul_(1.5)
    model.save_pretrained(path)
    return str(path)


def evaluate_on_mesh(engine, configs):
    """Run by every rank; the second evaluation follows a training step."""
    from importlib import import_module

    from tp2d_lib.mesh import build_mesh

    losses = []
    for config in configs:
        mesh = build_mesh(config.dp_size, config.tp_size)
        built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
        losses.append(evaluate.evaluate(built, config))
        assert built.model.training
        health.check_weights(built, 0)  # as before a checkpoint: sharded again
        micro = next(evaluate.batches(config, mesh["dp"].get_local_rank()))
        built.step([micro])
        losses.append(evaluate.evaluate(built, config))
    return losses


@pytest.mark.parametrize("pack", ["stream", "none"])
def test_no_token_is_left_out(config, pack):
    config = replace(config, pack=pack)
    folder = evaluate.prepare(config)
    rows, lengths = np.load(folder / "input_ids.npy"), np.load(folder / "lengths.npy")
    kept = [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]
    assert kept == [row for row in rows_of(config) if len(row) > 1]
    assert len(kept) % (config.batch_size_per_gpu * 2)


@pytest.mark.parametrize("pack", ["stream", "none"])
def test_equal_on_every_mesh_and_to_one_process(config, pack, pools, tmp_path):
    """One of the models is tied, the other has a head of its own."""
    config = replace(config, pack=pack)
    if pack == "none":
        config = replace(config, model_name=untied(config, tmp_path))
    config = replace(config, prepared_eval_data=str(evaluate.prepare(config)))
    expected = expected_loss(config)
    meshes = {
        "fsdp": [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 4, 2)],
        "fsdp, weights kept": [(1, 4, 1), (2, 2, 1)],
        "autotp": [(2, 2, 1)],
    }
    for name, sizes in meshes.items():
        engine, _, kept = name.partition(",")
        configs = [
            replace(
                config,
                tp_size=tp,
                dp_size=dp,
                dp_replicate_size=copies,
                num_workers=None,
                zero_stage=3,
                reshard_after_forward=not kept,
            )
            for tp, dp, copies in sizes
        ]
        for ranks in pools(4, engine).run(evaluate_on_mesh, engine, configs):
            before, after = ranks[0::2], ranks[1::2]
            assert before == pytest.approx([expected] * len(sizes), rel=1e-6)
            assert all(abs(loss - expected) > 1e-6 for loss in after)


@torch.no_grad()
def expected_of_chats(config, chats: list) -> float:
    """One process, one conversation at a time: the loss of the template's own marks."""
    model = AutoModelForCausalLM.from_pretrained(config.model_name)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    total, count = 0.0, 0
    for messages in chats:
        whole = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = map(torch.tensor, (whole["input_ids"], whole["assistant_masks"]))
        logits = model(ids[None]).logits[0, :-1]
        labels = ids[1:].masked_fill(mask[1:] == 0, -100)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def evaluate_and_export(engine, config, folder):
    """Run by every rank."""
    from importlib import import_module

    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    loss = evaluate.evaluate(built, config)
    built.export(folder)
    return loss


@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_of_conversations_the_assistant_is_evaluated(
    engine, demo_paths, pools, tmp_path
):
    """Several in a row, on a mesh; and the export can chat as the model could."""
    chats = [
        [
            {"role": "user", "content": f"What is {n} + {n}? " * (1 + n % 3)},
            {"role": "assistant", "content": f"It is {2 * n}. " * (1 + n % 4)},
        ]
        for n in range(40)
    ]
    folder = tmp_path / "chats"
    write_lines(folder, [{"messages": each} for each in chats], split="validation")
    config = TrainConfig(
        model_name=write_chat_model(demo_paths[0], tmp_path, "qwen", marked=True),
        dataset_name=str(folder),
        eval_every=1,
        seq_length=256,
        tp_size=2,
        dp_size=2,
        storage_path=str(tmp_path),
    )
    rows = evaluate.prepare(config)
    assert len(data.open_rows(rows).lengths) < 20
    config = replace(config, prepared_eval_data=str(rows))
    export = tmp_path / "export"
    found = pools(4, engine).run(evaluate_and_export, engine, config, str(export))
    assert found == pytest.approx([expected_of_chats(config, chats)] * 4, rel=1e-6)
    before, after = map(AutoTokenizer.from_pretrained, (config.model_name, export))
    assert before.chat_template == after.chat_template


def test_mistakes_name_the_held_out_data(config):
    with pytest.raises(
        ConfigError,
        match=r"^eval_split='dev' .* which has test; try eval_fraction=0.01",
    ):
        evaluate.prepare(replace(config, eval_split="dev"))
    rule = r"^eval_split='dev' .* which has test; try eval_fraction=0.01"
    with pytest.raises(ConfigError, match=rule):
        evaluate.prepare(replace(config, eval_split="dev"))
    with pytest.raises(ConfigError, match=r"^eval_dataset='gone' must be a file"):
        evaluate.prepare(replace(config, eval_dataset="gone"))


def test_a_hash_decides_what_is_held_out(config, tmp_path, capsys):
    """Each document is on one side, on the same one whatever else there is."""
    texts = [*sentences(400), *sentences(40)]  # some twice
    config = replace(
        config,
        dataset_name=write_texts(tmp_path / "texts", texts),
        eval_dataset=None,
        eval_fraction=0.1,
        pack="none",
        seq_length=64,
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)

    def documents(rows) -> list[str]:
        return tokenizer.batch_decode(np.load(rows / "input_ids.npy"), True)

    train, held_out = (
        documents(data.prepare(config)),
        documents(evaluate.prepare(config)),
    )
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 20 < len(held_out) < 70
    more = write_texts(tmp_path / "more", [*texts, "Another.", "And another."])
    again = documents(evaluate.prepare(replace(config, dataset_name=more)))
    assert set(held_out) <= set(again)
    said = data.describe(data.prepare(config))
    assert f"; {len(held_out)} held out" in said
    with pytest.raises(ConfigError, match="cannot be combined with eval_data"):
        replace(config, eval_dataset="other")


def test_the_datasets_own_split_is_the_default(config):
    own = replace(config, eval_dataset=None, eval_split="validation")
    assert evaluate.prepare(own) != evaluate.prepare(config)
    assert evaluate.prepare(replace(own, eval_every=0)) is None
