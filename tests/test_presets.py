"""Which preset is chosen, and why."""

import pytest

from tp2d_lib import presets
from tp2d_lib.config import ConfigError


@pytest.mark.parametrize(
    ("preset", "gpus", "name"),
    [
        ("auto", 0, "demo"),
        ("auto", 3, "demo"),
        ("auto", 4, "qwen2.5-0.5b"),
        ("demo", 8, "demo"),
    ],
)
def test_choice_follows_the_hardware(preset, gpus, name):
    chosen, reason = presets.choose(preset, gpus, num_workers=4)
    assert chosen == name
    assert reason


def test_unknown_preset():
    with pytest.raises(ConfigError, match="PRESET='dmo' must be one of auto, demo, "):
        presets.choose("dmo", 0, 4)
    with pytest.raises(ConfigError, match="try 'demo'"):
        presets.choose("dmo", 0, 4)


def test_settings_replace_the_presets(tmp_path):
    config = presets.build_config("demo", str(tmp_path), max_steps=3, tp_size=None)
    assert (config.max_steps, config.tp_size) == (3, 1)
    assert config.storage_path == str(tmp_path)


def test_demo_is_written_once_and_is_what_it_says(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tp2d_lib.data import demo

    model_name, _ = demo.write(tmp_path / "demo")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert demo.write(tmp_path / "demo")[0] == model_name
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    model = AutoModelForCausalLM.from_pretrained(model_name)
    assert 0.9e6 < model.num_parameters() < 1.2e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads == 4
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    for text in demo.paragraphs()[:50]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
