"""The families that people train today, on both engines: parity with one process.

The table in docs/families.md is what is observed here; ``TP2D_WRITE_FAMILIES=1``
writes it. For every decoder of transformers see tests/decoders.
"""

import os
import re
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.decoders import tiny
from tests.support import parity, reference
from tests.support.models import write_model
from tests.support.parity import (
    MAX_GRAD_NORM,
    STEPS,
    make_config,
    make_steps,
    share_of,
)
from tests.support.rules import FUSED
from tp2d_lib.config import ConfigError
from tp2d_lib.model import PlanError, attention

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BLOCK = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- /families -->)", re.DOTALL)
ENGINES = {"fsdp": "FSDP2 + DTensor", "autotp": "DeepSpeed AutoTP"}
VARIANT = ("padded", 2, "sgd")
ATOL = 1e-4

EQUAL = "equal"
FAMILIES = {  # its text model's type, and what FSDP2 and AutoTP must do with it
    "Qwen 2.5": ("qwen2", EQUAL, EQUAL),
    "Qwen 3": ("qwen3", EQUAL, EQUAL),
    "Llama 3": ("llama", EQUAL, EQUAL),
    "Gemma 3 (text)": ("gemma3_text", EQUAL, EQUAL),
    "Gemma 4 (text)": ("gemma4_text", EQUAL, EQUAL),
    "Mistral": ("mistral", EQUAL, EQUAL),
    "Ministral 3": ("ministral3", EQUAL, EQUAL),
    "Phi-3, Phi-4": ("phi3", EQUAL, {"partition_config": FUSED}),
    "OLMo 3": ("olmo3", EQUAL, EQUAL),
    "SmolLM3": ("smollm3", EQUAL, EQUAL),
    "GLM-4": ("glm4", EQUAL, EQUAL),
}


def expected_of(family: str, engine: str) -> str | dict:
    """A cell of the table, or the settings that make AutoTP equal."""
    return dict(zip(ENGINES, FAMILIES[family][1:], strict=True))[engine]


def cell_of(expected: str | dict) -> str:
    """What the table says: a result, or parity with these settings."""
    if isinstance(expected, str):
        return expected
    (name, value), *_ = expected.items()
    return f"equal, `{name}`" if isinstance(value, dict) else f"equal, `{name}={value}`"


def accepted(engine: str, config, expected: str | dict) -> tuple:
    """The default where the driver accepts it, else with the family's own settings."""
    check = import_module(f"tp2d_lib.{engine}").check
    try:
        check(config)
        return config, EQUAL
    except (ConfigError, PlanError):
        if isinstance(expected, str):
            raise
    config = replace(config, **expected)
    check(config)
    return config, cell_of(expected)


def train(engine, config):
    """Run by every rank: losses and norms, or the error that ended it everywhere."""
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    steps = make_steps(*VARIANT[:2])
    try:
        built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
        batches = share_of(steps, mesh, config.batch_size_per_gpu)
        attention.check_apart(built, config)  # of documents in one row
        trained = [tuple(map(float, built.step(batch))) for batch in batches]
        built.export(config.export_to)
    except Exception as error:  # raised, it would end the group for other families
        return f"{type(error).__name__}: {error}"
    return trained


def check_equal(answers: list, config) -> None:
    """Losses and norms on every rank, and every exported weight."""
    losses, norms, weights = reference.train(
        config.model_name, VARIANT[2], make_steps(*VARIANT[:2]), MAX_GRAD_NORM
    )
    for got in answers:
        torch.testing.assert_close([g[0] for g in got], losses, rtol=1e-5, atol=0)
        torch.testing.assert_close([g[1] for g in got], norms, rtol=1e-4, atol=0)
    before, exported = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (config.model_name, config.export_to)
    )
    assert exported.keys() == weights.keys()
    decay = (1 - config.learning_rate * config.weight_decay) ** STEPS
    for key, weight in weights.items():
        apart = (exported[key] - weight).abs().max()
        assert apart <= ATOL, f"{key} is {apart} from one process"
        moved = (weight - decay * before[key]).abs().max()
        assert moved > 3 * ATOL, f"{key} moves too little to be compared: {moved}"


@pytest.fixture(scope="module")
def observe(pools, tmp_path_factory):
    """``observe(family, engine)``: the cell of the table, found out once."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def observe(family: str, engine: str) -> str:
        name = FAMILIES[family][0]
        tiny.write(name, folder / name)
        default = make_config(
            str(folder / name),
            str(folder),
            2,
            2,
            VARIANT,
            export_to=str(folder / engine / name),
            loss_chunk_tokens=24,  # of 64, so the last chunk is smaller
        )
        config, cell = accepted(engine, default, expected_of(family, engine))
        answers = pools(4, engine).run(train, engine, config)
        if isinstance(answers[0], str):
            return f"fails in the workers: {answers[0]}"
        check_equal(answers, config)
        return cell

    return observe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_family_equals_one_process(engine, family, observe):
    assert observe(family, engine) == cell_of(expected_of(family, engine))


WHOLE = {"sequence_parallel": "never"}
WINDOW = {"sliding_window": parity.SEQ // 2}


@pytest.mark.parametrize(
    ("engine", "name", "settings", "of_model"),
    [
        ("fsdp", "qwen3", WHOLE, {}),
        ("fsdp", "starcoder2", WHOLE, {}),  # replicated biases
        ("fsdp", "phi3", WHOLE, {}),
        ("fsdp", "olmo2", WHOLE, {}),
        ("fsdp", "mistral", {}, WINDOW),
        ("fsdp", "gemma2", {}, WINDOW),
        ("autotp", "mistral", {}, WINDOW),
    ],
)
def test_whole_sequences_equal_one_process(
    engine, name, settings, of_model, pools, tmp_path
):
    """Every tp rank has all positions between blocks, so masks are those of all."""
    path = write_model(name, tmp_path, initializer_range=0.2, **of_model)
    exported = str(tmp_path / "exported")
    settings = settings | {"export_to": exported, "loss_chunk_tokens": 24}
    config = make_config(path, str(tmp_path), 2, 2, VARIANT, **settings)
    config, _ = accepted(engine, config, EQUAL)
    answers = pools(4, engine).run(train, engine, config)
    check_equal(answers, config)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_routers_own_loss_is_refused(engine, tmp_path):
    """Each micro-batch of each dp rank would add one, of its own mean."""
    path = write_model("mixtral", tmp_path, output_router_logits=True)
    check = import_module(f"tp2d_lib.{engine}").check
    with pytest.raises(ConfigError, match=r"its router's; try .*=false"):
        check(make_config(path, str(tmp_path), 1, 1, VARIANT))


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_that_transformers_does_not_recompute(engine, tmp_path):
    tiny.write("gpt_neox_japanese", tmp_path / "model")
    config = make_config(str(tmp_path / "model"), str(tmp_path), 1, 1, VARIANT)
    check = import_module(f"tp2d_lib.{engine}").check
    for kind in ("selective", "full"):
        with pytest.raises(ConfigError, match=r"not GPTNeoXJapan.*; try .*='none'$"):
            check(replace(config, activation_checkpointing=kind))
    assert check(replace(config, activation_checkpointing="none"))


def test_the_page_says_what_was_observed(observe):
    lines = [["model family", *ENGINES.values()], ["---"] * (1 + len(ENGINES))]
    lines += [[f, *(observe(f, engine) for engine in ENGINES)] for f in FAMILIES]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if os.environ.get("TP2D_WRITE_FAMILIES"):
        PAGE.write_text(BLOCK.sub(lambda _: table, PAGE.read_text()))
    assert BLOCK.findall(PAGE.read_text()) == [table], (
        "docs/families.md must have the table that was observed; write it with "
        "TP2D_WRITE_FAMILIES=1 .venv/bin/python -m pytest tests/test_families.py"
    )
