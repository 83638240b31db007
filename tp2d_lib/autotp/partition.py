"""What DeepSpeed shards, by your rules, a preset, the model's plan or names."""

from __future__ import annotations

import inspect
import re

from deepspeed.module_inject.tp_plan_converter import SUPPORTED_STYLES, TPPlanConverter
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from torch import nn

from tp2d_lib.config import TrainConfig, closest
from tp2d_lib.model import PlanError, blocks

# Their fused weights store query, key and value head by head: shard plain columns.
INTERLEAVED = ("bloom", "falcon", "gpt_neox")
PUBLISHED = "the model's tp_plan"  # rules that the user did not choose
DERIVED = "rules for the blocks that can be sharded completely"
SPECS = {  # of a module's style in a plan
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    "replicated_with_grad_allreduce": {
        "partition_type": "skip",
        "grad_allreduce": True,
    },
}


def find_rules(model: nn.Module, config: TrainConfig) -> tuple[str, dict | None]:
    """The source of the sharding rules, and a ``partition_config`` that holds them.

    It is None where DeepSpeed takes the model's plan as it is. Your own rules and
    presets come first, then that plan. Of a plan that DeepSpeed knows only in part, or
    of usual names, rules are made for the blocks that can be sharded completely;
    DeepSpeed's own heuristics guess, and would shard others.

    Raises:
        PlanError: no block can be sharded.
    """
    if own := config.partition_config:
        preset = "" if "layer_specs" in own else f"={own['preset_model']!r}"
        return f"partition_config{preset}", own
    published = model.tp_plan or {}
    styles = derived_styles(model)
    if set(published.values()) <= SUPPORTED_STYLES and is_all_sharded(model, styles):
        return PUBLISHED, None
    if not styles:
        unknown = sorted(set(published.values()) - SUPPORTED_STYLES)
        why = f"DeepSpeed does not know {', '.join(unknown)}" if unknown else "has none"
        raise PlanError(
            f"{type(model).__name__} must have layers that DeepSpeed can shard, by a "
            f"tp_plan or by their names, but {why}; try a "
            "partition_config, or tp_size=1"
        )
    specs = [
        {"patterns": [rf"^{re.escape(name)}\.weight$"], **SPECS[style]}
        for name, style in styles.items()
    ]
    return DERIVED, {"use_default_specs": False, "layer_specs": specs}


def derived_styles(model: nn.Module) -> dict[str, str]:
    """The style of each module in a block that DeepSpeed can shard completely.

    Autograd refuses to write over a block's output, as Llama 4 does.
    """
    styles = blocks.shardable(model, SPECS.keys())
    around = {name: name.rsplit(".", 2)[0] for name in styles}
    written = {
        name
        for name in set(around.values())
        if ".add_(" in inspect.getsource(type(model.get_submodule(name)))
    }
    return {
        name: style for name, style in styles.items() if around[name] not in written
    }


def is_all_sharded(model: nn.Module, styles: dict[str, str]) -> bool:
    """Whether the blocks that can be sharded are all that the model's plan names."""
    named = {
        name
        for name, module in model.named_modules()
        if blocks.pattern_of(name) in model.tp_plan
        and module not in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    return bool(named) and named <= styles.keys()


def layer_specs(model: nn.Module, rules: dict | None) -> list:
    """The rules as DeepSpeed's objects, presets among them."""
    if rules is None:
        return TPPlanConverter.convert(model.tp_plan)
    preset = rules.get("preset_model")  # on top of which DeepSpeed puts the rest
    chosen = TPTrainingConfig(preset_model=preset, partition_config=rules)
    return chosen.get_partition_config_object().layer_specs


def describe(source: str, config: TrainConfig) -> str:
    """For the log: where the rules come from, and how the vocabulary is kept."""
    if config.tp_size == 1:
        return "tp_size=1: nothing is sharded over tp"
    vocabulary = "sharded" if config.vocab_parallel_lm_head else "replicated"
    return f"sharded by {source}; vocabulary {vocabulary}"


def check(model: nn.Module, config: TrainConfig) -> tuple[str, dict | None]:
    """Find, on an empty model, rules that match nothing or shard half of a pair.

    Returns:
        What ``find_rules`` does; at tp_size 1 there is nothing to shard.

    Raises:
        PlanError: names the rule or the module.
    """
    if config.tp_size == 1:
        return PUBLISHED, None
    source, given = find_rules(model, config)
    if source == DERIVED:
        return source, given
    rules = layer_specs(model, given)
    weights = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    }
    if source != PUBLISHED:  # a published plan may name parts of larger siblings
        check_every_rule_matches(source, rules, weights)
    found = match(rules, weights, model.config.model_type)
    check_vocabulary(source, found, model, config)
    parts: dict[str, dict] = {}
    for weight, module in weights.items():
        if (
            isinstance(module, nn.Linear)
            and module is not model.get_output_embeddings()
        ):
            parent, _, name = weight.removesuffix(".weight").rpartition(".")
            parts.setdefault(parent, {})[name] = (found.get(weight), module)
    if not any(is_sharded(r) for block in parts.values() for r, _ in block.values()):
        raise PlanError(
            f"{source} must shard at least one layer, but shards none; try tp_size=1"
        )
    for name, block in parts.items():
        check_block(source, name, block, model.config)
    return source, given


def check_every_rule_matches(source: str, rules: list, weights: dict) -> None:
    for rule in rules:
        for pattern in rule.patterns:
            if not any(re.match(pattern, weight) for weight in weights):
                near = closest(pattern, list(weights))
                raise PlanError(
                    f"{source}: the pattern {pattern!r} must match the name of a "
                    f"weight, but matches none; the model has names such as {near!r}"
                )


def match(rules: list, weights: dict, model_type: str) -> dict:
    """Weight name -> the first rule that matches it, as DeepSpeed chooses."""
    found = {}
    for weight in weights:
        rule = next((rule for rule in rules if rule.matches(weight, model_type)), None)
        if rule is not None:
            found[weight] = rule
    return found


def check_vocabulary(source: str, found: dict, model: nn.Module, config: TrainConfig):
    """Check that no rule shards the embedding, or the head without gathering it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in model.named_modules():
        rule = found.get(f"{name}.weight")
        if module is embedding and is_sharded(rule):
            raise PlanError(
                f"{source} must not shard {name!r}; vocab_parallel_lm_head=True shards "
                "it over the vocabulary"
            )
        local = module is head and is_sharded(rule) and not is_row(rule)
        if local and not (config.vocab_parallel_lm_head or rule.gather_output):
            raise PlanError(
                f"{source} must gather the output of {name!r}, or the loss would see a "
                "shard of the vocabulary; try gather_output=true, or "
                "vocab_parallel_lm_head=True"
            )


def check_block(source: str, name: str, block: dict, hf) -> None:
    """Check that a sharded block shards every Linear, by columns and then by rows."""
    sharded = {n: rule for n, (rule, _) in block.items() if is_sharded(rule)}
    if not sharded:
        return
    replicated = [n for n, (rule, _) in block.items() if rule is None]
    rows = [n for n, rule in sharded.items() if is_row(rule)]
    for kind, missing in (("row", not rows), ("column", len(rows) == len(sharded))):
        if missing:
            raise PlanError(
                f"{source} must shard {name!r} by columns and by rows, but leaves out "
                f"the {kind} half of {', '.join(sharded)}; try a rule with "
                f"partition_type {kind!r} for {', '.join(replicated) or 'one of them'}"
            )
    if replicated:
        raise PlanError(
            f"{source} must shard every Linear of {name!r} or none, but leaves "
            f"{', '.join(replicated)} replicated beside {', '.join(sharded)}"
        )
    if hf.model_type in INTERLEAVED or {"q_proj", "gate_proj"} & block.keys():
        return  # interleaved, or not fused
    into = block[rows[0]][1].in_features
    for n in sharded:
        columns = block[n][1].out_features
        parts = parts_of(columns, sharded[n])
        wanted = fused_parts(name, into, hf)
        if n not in rows and columns == sum(wanted) and parts != wanted:
            raise PlanError(
                f"{source} must shard '{name}.{n}' as the {len(wanted)} weights fused "
                f"in it, {wanted}, not as {parts}; try the shape {[wanted, -1]}"
            )


def parts_of(columns: int, rule) -> list[int]:
    """Columns of each part into which a rule splits a fused weight."""
    if sizes := rule.get_sub_param_sizes():
        return list(sizes)
    count = rule.get_num_sub_params() or 1
    return [columns // count] * count


def fused_parts(name: str, into: int, hf) -> list[int]:
    """Columns of query, key, value in attention, or of gate and up in an MLP."""
    if "att" not in name:
        return [into, into]
    head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    keys = head * (getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads)
    return [into, keys, keys]


def is_sharded(rule) -> bool:
    return rule is not None and rule.partition_type.value != "skip"


def is_row(rule) -> bool:
    return rule.partition_type.value == "row"
