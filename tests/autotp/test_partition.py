"""What DeepSpeed shards: each source equals one process, mistakes are named."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.decoders import tiny
from tests.support.autotp import STAGES, make_config, train
from tests.support.models import write_model
from tests.support.parity import assert_weights_equal, train_references
from tests.support.rules import (
    ATTENTION,
    COLUMNS,
    FUSED,
    GATE_UP,
    MLP,
    ONLY_MLP,
    QKV,
    ROWS_RULE,
    rules,
)
from tp2d_lib import autotp
from tp2d_lib import model as models_of
from tp2d_lib.autotp import partition
from tp2d_lib.autotp.loading import load_full_model
from tp2d_lib.config import ConfigError
from tp2d_lib.model import PlanError

# One at each stage; together they have every pair of rows, count and optimizer.
VARIANTS = [
    ("packed", 1, "adamw"),
    ("packed", 2, "sgd"),
    ("padded", 2, "adamw"),
    ("padded", 1, "sgd"),
]
REPLICATED_ATTENTION = {  # on top of a preset, whose rules shard it
    "preset_model": "llama",
    "layer_specs": [{"patterns": [r".*\.self_attn\."], "partition_type": "skip"}],
}
SOURCES = {
    "plan, tied, vocabulary replicated": (
        "qwen2-tied",
        {"vocab_parallel_lm_head": False},
    ),
    "plan, untied, vocabulary replicated": ("llama", {"vocab_parallel_lm_head": False}),
    "preset": ("llama", {"partition_config": {"preset_model": "llama"}}),
    "preset, fused": ("phi3-mha", {"partition_config": "phi3"}),
    "rules, fused, untied": ("phi3", {"partition_config": FUSED}),
    "rules, fused, tied": ("phi3-tied", {"partition_config": FUSED}),
    "rules for some": ("llama", {"partition_config": ONLY_MLP}),
    "rules on top of a preset": (
        "llama",
        {"partition_config": REPLICATED_ATTENTION},
    ),
    "blocks": ("stablelm", {}),
}
SAID = {
    "preset": "partition_config='llama'",
    "rules for some": "partition_config",
    "rules on top of a preset": "partition_config",
    "blocks": "rules for the blocks that can be sharded completely",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = {name for name, _ in SOURCES.values()} | {"gpt-neox", "gemma"}
    return {name: write_model(name, folder) for name in names}


@pytest.fixture(scope="module")
def references(models):
    return train_references(models, VARIANTS)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_equals_one_process(
    source, stage, models, references, pools, tmp_path
):
    name, settings = SOURCES[source]
    variant = VARIANTS[stage]
    config = make_config(models[name], str(tmp_path), 2, 2, stage, variant)
    answers = pools(4, "autotp-(2, 2)").run(
        train, replace(config, **settings), variant[0], str(tmp_path), False
    )
    losses, norms, weights = references[(name, *variant)]
    for got, _ in answers:
        torch.testing.assert_close([g[0] for g in got], losses, rtol=1e-5, atol=0)
        torch.testing.assert_close([g[1] for g in got], norms, rtol=1e-4, atol=0)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert_weights_equal(dict(exported.named_parameters()), weights)


def kinds_of(config):
    """Run by every rank: the class that each weight's module has become, its shape."""
    from tp2d_lib.mesh import build_mesh

    engine = autotp.build_engine(config, build_mesh(config.dp_size, config.tp_size))
    kinds = {
        name: (type(module).__name__, tuple(module.weight.shape))
        for name, module in engine.model.named_modules()
        if getattr(module, "weight", None) is not None
    }
    return kinds, engine.notice


def test_precedence_rules_then_plan_then_names(models, pools, tmp_path):
    """What DeepSpeed made of the modules, beside what we say it would."""
    ranks = pools(4, "autotp-(2, 2)")
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    attention, mlp = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"

    kinds, notice = ranks.run(kinds_of, config)[0]
    assert kinds[attention] == ("LinearLayer", (32, 64))
    assert kinds[mlp] == ("LinearLayer", (48, 64))
    assert "sharded by the model's tp_plan; vocabulary sharded" in notice

    kinds, notice = ranks.run(kinds_of, replace(config, partition_config=ONLY_MLP))[0]
    assert kinds[attention] == ("Linear", (64, 64))  # the plan would have sharded it
    assert kinds[mlp] == ("LinearLayer", (48, 64))
    assert "sharded by partition_config; " in notice

    # Left to the source, the vocabulary is sharded by the plan, not by names.
    config = replace(config, vocab_parallel_lm_head=False)
    kinds, notice = ranks.run(kinds_of, config)[0]
    assert kinds["lm_head"][0] == "LinearLayer"
    kinds, notice = ranks.run(kinds_of, replace(config, model_name=models["stablelm"]))[
        0
    ]
    assert kinds["lm_head"][0] == "Linear"
    assert kinds[attention] == ("Linear", (64, 64))  # it counts on all heads
    assert kinds[mlp] == ("LinearLayer", (48, 64))
    assert "sharded by rules for the blocks that can be sharded" in notice


def test_vocabulary_tied_and_untied(models, pools, tmp_path):
    ranks = pools(4, "autotp-(2, 2)")
    for name in ("qwen2-tied", "llama", "stablelm"):
        config = make_config(models[name], str(tmp_path), 2, 2, 1, VARIANTS[0])
        answers = [kinds for kinds, _ in ranks.run(kinds_of, config)]
        for module in ("model.embed_tokens", "lm_head"):
            rows = [kinds[module][1][0] for kinds in answers]
            assert sorted(rows[:2]) == [254, 255], (name, module)  # of 509


@pytest.mark.parametrize("source", SAID)
def test_the_source_is_said(source, models, tmp_path):
    name, settings = SOURCES[source]
    config = make_config(models[name], str(tmp_path), 2, 2, 1, VARIANTS[0])
    config = replace(config, **settings)
    empty = models_of.build_empty_model(config)
    assert partition.find_rules(empty, config)[0] == SAID[source]
    autotp.check(config)


EMBEDDING = {"patterns": [".*embed_tokens.weight$"], "partition_type": "row"}
HEAD = {"patterns": [".*lm_head.weight$"], "partition_type": "column"}
WRONG = {  # what is given -> what the sentence must name
    "matches nothing": (
        "llama",
        rules(*MLP, {"patterns": [".*fc1.weight$"], **COLUMNS}),
        r"'\.\*fc1\.weight\$' must match the name of a weight",
    ),
    "no row": ("llama", rules(MLP[0]), r"'model.layers.0.mlp' .* row half of gate_pro"),
    "no column": ("llama", rules(MLP[1]), r"mlp' .* column half of down_proj"),
    "part of a block": (
        "llama",
        rules({"patterns": [r".*mlp\.up_proj\.weight$"], **COLUMNS}, MLP[1]),
        "must shard every Linear of 'model.layers.0.mlp' .* gate_proj replicated",
    ),
    "attention without its row": (
        "llama",
        rules(*MLP, ATTENTION),
        "'model.layers.0.self_attn' .* row half of q_proj",
    ),
    "nothing at all": (
        "llama",
        rules({"patterns": [r".*mlp\..*weight$"], "partition_type": "skip"}),
        "must shard at least one layer, but shards none; try tp_size=1",
    ),
    "the embedding": (
        "llama",
        rules(*MLP, EMBEDDING),
        "not shard 'model.embed_tokens'",
    ),
    "fused, no shape": (
        "phi3",
        rules(ROWS_RULE, QKV, {**GATE_UP, "shape": None} | {"shape": [1, -1]}),
        r"gate_up_proj' as the 2 weights .* not as \[192\]; try .* \[\[96, 96\], -1\]",
    ),
    "fused, equal parts": (
        "phi3",
        rules(ROWS_RULE, GATE_UP, {**QKV, "shape": [2, -1]}),
        r"qkv_proj' as the 3 .* not as \[64, 64\]; try .* \[\[64, 32, 32\], -1\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_are_named_in_the_driver(case, models, tmp_path):
    name, wrong, sentence = WRONG[case]
    config = make_config(models[name], str(tmp_path), 2, 2, 1, VARIANTS[0])
    with pytest.raises(PlanError, match=sentence):
        autotp.check(replace(config, partition_config=wrong))


def test_a_head_in_columns_must_be_gathered(models, tmp_path):
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    config = replace(config, partition_config=rules(*MLP, HEAD))
    autotp.check(config)  # vocabulary-parallel: the loss knows
    config = replace(config, vocab_parallel_lm_head=False)
    with pytest.raises(PlanError, match="must gather the output of 'lm_head'"):
        autotp.check(config)
    gathered = rules(*MLP, {**HEAD, "gather_output": True})
    autotp.check(replace(config, partition_config=gathered))


def test_presets_that_do_not_fit_are_refused(models, tmp_path):
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    with pytest.raises(
        ConfigError, match=r"lama' must be llama, bloom, .*, a JSON file"
    ):
        autotp.check(replace(config, partition_config="lama"))
    with pytest.raises(PlanError, match=r"='mixtral': the pattern .* matches none"):
        autotp.check(replace(config, partition_config="mixtral"))
    config = make_config(models["phi3"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    with pytest.raises(PlanError, match=r"_config='phi3' must .* as the 3 weights"):
        autotp.check(replace(config, partition_config="phi3"))  # fewer key-value heads
    with pytest.raises(
        PlanError, match=r"layers that DeepSpeed can .* partition_config"
    ):
        autotp.check(config)  # its own plan


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpt2", "GPT2LMHeadModel must have layers that DeepSpeed can shard"),
        ("zamba", "ZambaForCausalLM must have layers that"),  # they share blocks
        ("bart", "must be a decoder whose loss can count the tokens"),
        ("deepseek_v32", r"weight_decay=0.01 must be 0 .*indexer.* weight_decay=0.0"),
        ("longcat_flash", "dp_size=2 must be 1 for LongcatFlashForCausalLM"),
    ],
)
def test_decoders_that_would_fail_in_the_workers(name, sentence, tmp_path):
    tiny.write(name, tmp_path / "model")
    path = str(tmp_path / "model")
    config = make_config(path, str(tmp_path), 2, 2, 1, VARIANTS[0])
    with pytest.raises((ConfigError, PlanError), match=sentence):
        autotp.check(config)


def test_what_a_model_freezes_stays_frozen(tmp_path):
    """from_pretrained trains it, and a router's bias without gradient would decay."""
    tiny.write("laguna", tmp_path / "model")
    path = str(tmp_path / "model")
    model = load_full_model(make_config(path, str(tmp_path), 1, 2, 1, VARIANTS[0]))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.layers.1.mlp.gate.e_score_correction_bias"]


def test_sharding_that_changes_the_numbers_is_refused(models, pools, tmp_path):
    """GPT-NeoX keeps a head's query, key and value together: three parts are wrong."""
    fused = r".*attention\.query_key_value\.weight$"
    wrong = rules(
        {"patterns": [fused], "shape": [3, -1]},
        {"patterns": [r".*attention\.dense\.weight$"], "partition_type": "row"},
    )
    config = make_config(models["gpt-neox"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    ranks = pools(4, "autotp-(2, 2)")
    for said in ranks.run(refusal, replace(config, partition_config=wrong)):
        assert "must compute what it did before, but a loss of" in said
    right = rules({"patterns": [fused]}, wrong["layer_specs"][1])
    assert ranks.run(refusal, replace(config, partition_config=right)) == [None] * 4


def refusal(config):
    """Run by every rank: what build_engine says, or None."""
    from tp2d_lib.mesh import build_mesh

    try:
        autotp.build_engine(config, build_mesh(config.dp_size, config.tp_size))
    except PlanError as error:
        return str(error)


def test_a_vocabulary_that_cannot_be_sharded_is_said(models, tmp_path):
    config = make_config(models["gemma"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    asked = replace(config, vocab_parallel_lm_head=True)
    with pytest.raises(PlanError, match=r"Gemma.* try vocab_parallel_lm_head=F"):
        autotp.check(asked)
    checked = autotp.check(config)  # left to the engine, it stays replicated
    assert checked.vocab_parallel_lm_head is False
    assert "vocabulary replicated" in partition.describe("", checked)


def test_one_key_value_head_cannot_be_sharded(tmp_path):
    path = write_model("bigcode", tmp_path)
    with pytest.raises(ConfigError, match="tp_size=2 must divide the 1 key-value"):
        autotp.check(make_config(path, str(tmp_path), 2, 2, 1, VARIANTS[0]))


BAD_FILES = {
    "no such file": ("rules.json", "a JSON file or JSON text"),
    "not JSON": ("{", "a JSON file or JSON text"),
    "a list": ({"layer_specs": [[]]}, r"layer_specs.0=\[\] must be a valid dict"),
    "no rules": ({"use_default_specs": False}, "must have layer_specs"),
    "unknown key": ({"layer_spec": []}, "config.layer_spec=.* must be left out"),
    "unknown word": (
        rules({"pattern": ["x"]}),
        "layer_specs.0.patterns=.* must be given; try",
    ),
    "unknown kind": (
        rules({"patterns": ["x"], "partition_type": "rows"}),
        "partition_type='rows' must be 'column', 'row' or 'skip'; try",
    ),
    "not an expression": (rules({"patterns": ["("]}), "must be a regular expression"),
    "no patterns": (rules({"partition_type": "row"}), "patterns=.* must be given"),
    "wrong type": (rules({"patterns": "x"}), "patterns='x' must be a valid list"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_rules_end_in_the_driver(case, models, tmp_path):
    value, sentence = BAD_FILES[case]
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    with pytest.raises(ConfigError, match=sentence):
        autotp.check(replace(config, partition_config=value))


def test_rules_from_a_file_travel_with_the_config(models, tmp_path):
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(ONLY_MLP))
    for given in (str(file), json.dumps(ONLY_MLP), ONLY_MLP):
        checked = autotp.check(replace(config, partition_config=given))
        assert checked.partition_config == ONLY_MLP
