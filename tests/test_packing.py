"""Documents that share a row train as if each were alone."""

import importlib.util
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, BloomConfig

from tests.support import reference
from tests.support.models import VOCAB_SIZE, write_model
from tests.support.parity import (
    MAX_GRAD_NORM,
    SEQ,
    STEPS,
    assert_weights_equal,
    make_config,
)
from tp2d_lib import autotp
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model import PlanError, build_empty_model
from tp2d_lib.model.attention import check_documents

MESHES = [(1, 1), (2, 2), (4, 1)]
VARIANTS = [("documents", 1, "sgd"), ("documents", 2, "adamw")]
LENGTHS = [(12, 20), (5, 9, 17), (31,), (2, 3, 4, 22)]  # of the documents in a row


def make_documents(accumulation: int) -> list:
    """Steps of micro-batches of rows of documents, each its ids and labels.

    Like in a chat, some of a document's tokens are trained on.
    """
    generator = torch.Generator().manual_seed(7)
    draw = lambda n: torch.randint(VOCAB_SIZE, (n,), generator=generator)  # noqa: E731

    def document(length: int):
        ids, labels = draw(length), None
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.4, -100)
        labels[-1] = ids[-1]  # something counts
        return ids, labels

    rows = lambda: [list(map(document, lengths)) for lengths in LENGTHS]  # noqa: E731
    return [[rows() for _ in range(accumulation)] for _ in range(STEPS)]


def pack(rows: list) -> dict[str, torch.Tensor]:
    """A micro-batch of rows, by hand."""
    micro = {
        "input_ids": torch.zeros(len(rows), SEQ, dtype=torch.int64),
        "labels": torch.full((len(rows), SEQ), -100),
        "position_ids": torch.zeros(len(rows), SEQ, dtype=torch.int64),
    }
    for row, documents in enumerate(rows):
        start = 0
        for ids, labels in documents:
            place = slice(start, start + len(ids))
            micro["input_ids"][row, place] = ids
            micro["labels"][row, place] = labels
            micro["labels"][row, start] = -100  # predicted by nothing
            micro["position_ids"][row, place] = torch.arange(len(ids))
            start += len(ids)
    return micro


def one_by_one(steps: list) -> list:
    """The same documents for the reference, none beside another."""
    return [
        [
            (ids[None], labels[None])
            for rows in step
            for row in rows
            for ids, labels in row
        ]
        for step in steps
    ]


@torch.no_grad()
def losses_alone(path: str, rows: list) -> list[float]:
    """The summed loss of each document, in one process."""
    model = AutoModelForCausalLM.from_pretrained(path)
    losses = []
    for ids, labels in (document for row in rows for document in row):
        logits = model(ids[None]).logits[0, :-1]
        losses.append(float(F.cross_entropy(logits, labels[1:], reduction="sum")))
    return losses


def train_packed(engine: str, config, accumulation: int, folder: str):
    """Run by every rank: each document's loss, then losses and norms of training."""
    from tp2d_lib.mesh import build_mesh
    from tp2d_lib.model.attention import check_apart

    mesh = build_mesh(config.dp_size, config.tp_size)
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    check_apart(built, config)
    steps = make_documents(accumulation)
    rows, each = steps[0][0], []
    whole = pack(rows)
    number = (whole["position_ids"] == 0).flatten().cumsum(0).view(len(rows), SEQ)
    with torch.no_grad():
        for document in number.unique():
            labels = whole["labels"].masked_fill(number != document, -100)
            if (labels != -100).any():  # no padding
                each.append(float(built.summed_loss(whole | {"labels": labels})))
    size, first = config.batch_size_per_gpu, mesh["dp"].get_local_rank()
    share = slice(first * size, (first + 1) * size)
    figures = [
        tuple(map(float, built.step([pack(micro[share]) for micro in step])))
        for step in steps
    ]
    built.export(folder)
    return each, figures


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(name, folder) for name in ("qwen2-tied", "llama")}


@pytest.fixture(scope="module")
def references(models):
    return {
        (name, variant): reference.train(
            path, variant[2], one_by_one(make_documents(variant[1])), MAX_GRAD_NORM
        )
        for name, path in models.items()
        for variant in VARIANTS
    }


@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_packed_documents_train_as_if_alone(
    engine, mesh, models, references, pools, tmp_path
):
    tp_size, dp_size = mesh
    ranks = pools(tp_size * dp_size, f"{engine}-{mesh}")
    for name, variant in (("qwen2-tied", VARIANTS[0]), ("llama", VARIANTS[1])):
        losses, norms, weights = references[name, variant]
        alone = losses_alone(models[name], make_documents(variant[1])[0][0])
        config = make_config(models[name], str(tmp_path), *mesh, variant)
        folder = str(tmp_path / name)
        for each, figures in ranks.run(
            train_packed, engine, config, variant[1], folder
        ):
            torch.testing.assert_close(each, alone, rtol=1e-5, atol=1e-5)
            got = tuple(zip(*figures, strict=True))
            torch.testing.assert_close(list(got[0]), losses, rtol=1e-5, atol=0)
            torch.testing.assert_close(list(got[1]), norms, rtol=1e-4, atol=0)
        exported = AutoModelForCausalLM.from_pretrained(folder)
        assert_weights_equal(dict(exported.named_parameters()), weights)


@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_eager_attention_keeps_documents_apart(
    engine, models, references, pools, tmp_path
):
    """So will others of transformers: from the position ids alone."""
    own = {"attn_implementation": "eager"}
    config = make_config(models["llama"], str(tmp_path), 2, 2, VARIANTS[1], **own)
    losses, norms, _ = references["llama", VARIANTS[1]]
    ranks = pools(4, f"{engine}-(2, 2)")
    for _, figures in ranks.run(train_packed, engine, config, 2, str(tmp_path / "out")):
        got = tuple(zip(*figures, strict=True))
        torch.testing.assert_close(list(got[0]), losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(list(got[1]), norms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_needs_a_gpu_is_refused_on_cpus(name, models, tmp_path):
    config = make_config(models["llama"], str(tmp_path), 1, 1, VARIANTS[0])
    config = replace(config, attn_implementation=name, device="cpu")
    with pytest.raises(ConfigError, match=r"attn_implementation=.* try 'sdpa' on CPUs"):
        autotp.check(config)
    packed = replace(config, attn_implementation="flash_attention_2", pack="documents")
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    with pytest.raises(ConfigError, match=r"batch_size_per_gpu=4 must be 1 .* try 1,"):
        check_documents(model, packed)
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ConfigError, match="and that is installed"):
            build_empty_model(packed)


def looks_around(engine: str, config, leave_out: str) -> str:
    """Run by every rank: what ``check_apart`` says of a model that ignores an input."""
    from tp2d_lib.mesh import build_mesh
    from tp2d_lib.model.attention import check_apart

    mesh = build_mesh(config.dp_size, config.tp_size)
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    forward = built.model.forward
    built.model.forward = lambda **inputs: forward(**inputs | {leave_out: None})
    with pytest.raises(PlanError) as caught:
        check_apart(built, config)
    return str(caught.value)


@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_a_model_that_looks_around_is_found(engine, models, pools, tmp_path):
    """One that takes the mask and does not use it; the loss alone would not tell."""
    config = make_config(models["llama"], str(tmp_path), 1, 1, VARIANTS[0])
    ranks = pools(1, f"{engine}-{MESHES[0]}")
    (said,) = ranks.run(looks_around, engine, config, "attention_mask")
    assert "llama must not look from one document into another" in said


def compare_apart(config) -> bool:
    """Run by every rank."""
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh
    from tp2d_lib.model.attention import check_apart

    mesh = build_mesh(config.dp_size, config.tp_size)
    check_apart(build_engine(config, mesh), config)
    return True


@pytest.mark.parametrize("precision", [{"dtype": "bfloat16"}, {"autocast": True}])
def test_bfloat16_rounds_more_than_float32(precision, pools, tmp_path):
    """Its masters are float32; what counts is what the model computes in."""
    length = 600  # a CPU adds up attention in blocks of 512
    sizes = {"num_hidden_layers": 8, "max_position_embeddings": length}
    deep = write_model("llama", tmp_path, initializer_range=0.2, **sizes)
    config = make_config(deep, str(tmp_path), 1, 1, VARIANTS[0], **precision)
    config = replace(config, seq_length=length, batch_size_per_gpu=1)
    ranks = pools(1, f"fsdp-{MESHES[0]}")
    assert ranks.run(compare_apart, config) == [True]
    (said,) = ranks.run(looks_around, "fsdp", config, "attention_mask")
    assert "llama must not look from one document into another" in said


def test_a_model_without_position_ids_is_refused(tmp_path, demo_paths):
    """BLOOM tells positions by its mask; DeepSpeed can train it otherwise."""
    sizes = {"hidden_size": 64, "n_layer": 1, "n_head": 4, "vocab_size": 2048}
    model = AutoModelForCausalLM.from_config(BloomConfig(**sizes))
    model.save_pretrained(tmp_path / "bloom")
    for file in Path(demo_paths[0]).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "bloom")
    config = TrainConfig(
        model_name=str(tmp_path / "bloom"),
        dataset_name=demo_paths[1],
        seq_length=64,
        storage_path=str(tmp_path),
        device="cpu",
    )
    autotp.check(config)
    with pytest.raises(
        ConfigError, match=r"^pack='documents' works only with .* try 'stream'"
    ):
        autotp.check(replace(config, pack="documents"))
