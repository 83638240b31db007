"""What pages of docs/ tell a reader to run, runs, and prints what they say."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from scripts import what_fits
from scripts.gpu import sizes
from tests.support import reference
from tp2d_lib import data
from tp2d_lib.config import TrainConfig
from tp2d_lib.flags import build_parser

ROOT = Path(__file__).parents[1]
QWEN = Qwen2Config(  # as Qwen2.5-7B's config.json on the Hub says
    architectures=["Qwen2ForCausalLM"],
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=131072,
)


def blocks(page: str, kind: str = "") -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.faults
def test_the_meshes_for_a_7b_model_are_what_the_command_prints(tmp_path):
    command, table, *_ = blocks("first-run.md")
    QWEN.save_pretrained(tmp_path / "Qwen2.5-7B")
    command = command.replace("Qwen/Qwen2.5-7B", "Qwen2.5-7B").replace("\\\n", "")
    script = str(ROOT / command.split()[1])
    run = subprocess.run(
        [sys.executable, script, *command.split()[2:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith(table)
    fastest = int(table.split()[-1].replace(",", ""))
    text = (ROOT / "docs" / "first-run.md").read_text()
    assert f"{16 * fastest:,} together" in text
    minutes = 100e6 / (16 * fastest) / 60
    hours = 1e9 / (16 * fastest) / 3600
    assert f"tokens take {minutes:.0f} minutes, a billion take {hours:.1f}" in text


@pytest.mark.faults
@pytest.mark.parametrize("way", ["whole", "LoRA"])
def test_what_fits_on_four_small_gpus_is_what_the_dry_run_says(way, tmp_path):
    machine = what_fits.MACHINES[1]
    sizes.write_config("7b", tmp_path)
    said = what_fits.fitting(tmp_path, "7b", machine, way)
    table = what_fits.PAGE.read_text().partition(what_fits.MARK)[2]
    titles, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    (row,) = (row for row in rows if row[:2] == ["7B", way])
    assert row[titles.index(machine.name)] == said


def test_the_commands_for_a_7b_model_have_these_flags():
    commands = [
        b for b in blocks("first-run.md") if b.startswith("python train_fsdp.py")
    ]
    assert len(commands) == 4
    for command in commands:
        build_parser("fsdp", "").parse_args(command.replace("\\\n", "").split()[2:])


@pytest.mark.ranks
@pytest.mark.faults
def test_training_under_torchrun_is_that_of_one_process(demo_paths, tmp_path):
    model, dataset = demo_paths
    settings = {"seq_length": 64, "cache_dir": str(tmp_path / "rows")}
    (block,) = blocks("clusters.md", "python")
    for shown, here in (
        ("Qwen/Qwen2.5-0.5B", model),
        ("my.jsonl", dataset),
        ('device="cuda",  # or "cpu"', f'device="cpu", **{json.dumps(settings)},'),
        ("max_steps=100", "max_steps=3, learning_rate=1e-3"),
    ):
        assert shown in block
        block = block.replace(shown, here)
    (tmp_path / "train.py").write_text(block)
    torchrun = Path(sys.executable).with_name("torchrun")
    run = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = re.findall(r"^step \d loss ([\d.]+) norm ([\d.]+)$", run.stdout, re.M)

    config = TrainConfig(model_name=model, dataset_name=dataset, **settings)
    config = replace(config, max_steps=3)
    loader = data.BatchLoader(config, data.prepare(config), dp_rank=0)
    steps = [[(m["input_ids"], m["labels"]) for m in step] for step in loader][:3]
    losses, norms, *_ = reference.train(model, "adamw", steps, 1.0)
    own = [[float(value) for value in pair] for pair in found]
    torch.testing.assert_close(
        own, [*map(list, zip(losses, norms, strict=True))], rtol=1e-4, atol=1e-4
    )
    assert (tmp_path / "state").is_dir()
    assert (tmp_path / "export" / "model.safetensors").is_file()
