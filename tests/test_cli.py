"""The two commands: every field a flag, exit codes, resume after SIGKILL."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import pipeline

from tests.support import commands
from tests.support.demo import train_without_ray
from tp2d_lib import cli, fsdp
from tp2d_lib.config import FIELDS, ConfigError, TrainConfig
from tp2d_lib.flags import (
    DEFAULTS,
    FLAGS,
    ONLY,
    build_parser,
    check_run_exists,
    read_config,
)
from tp2d_lib.run import failures, launch
from tp2d_lib.validation import leaves

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = {  # a flag's text and the value it must become, where one text does not do
    "optimizer": "sgd",
    "lr_scheduler_type": "constant",
    "device": "cpu",
    "dtype": "float32",
}


def parse(engine, *argv):
    return vars(build_parser(engine, "").parse_args(argv))


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_flag_that_carries_its_value(name):
    flag, default = f"--{FLAGS.get(name, name)}", FIELDS[name].default
    engine = "fsdp" if FIELDS[name].description.startswith("FSDP2: ") else "autotp"
    if bool in leaves(FIELDS[name].annotation):
        assert parse(engine, flag) == {name: True}
        assert parse(engine, f"--no-{flag[2:]}") == {name: False}
        return
    text = SAMPLES.get(name, "3")
    (dest, value), *others = parse(engine, flag, text).items()
    assert (dest, str(value).removesuffix(".0"), others) == (name, text, [])
    known = (str, int, float) if default is None else (type(default), int)
    assert type(value) in known


def test_each_command_has_its_engines_fields():
    helps = {name: field.description for name, field in FIELDS.items()}
    shared = {name for name, text in helps.items() if ": " not in text[:12]}
    for engine, only in ONLY.items():
        own = {name for name, text in helps.items() if text.startswith(only)}
        flags = {action.dest for action in build_parser(engine, "")._actions}
        assert flags & helps.keys() == shared | own
        assert {"autotp": "zero_stage", "fsdp": "autocast"}[engine] in own


def test_published_defaults():
    defaults = {name: field.default for name, field in FIELDS.items()} | DEFAULTS
    expected = {
        "model_name": "Qwen/Qwen2-7B",
        "dp_size": 1,
        "num_workers": None,
        "batch_size_per_gpu": 1,
        "seq_length": 2048,
        "num_epochs": 3,
        "learning_rate": 1e-5,
        "storage_path": "/mnt/cluster_storage",
        "zero_stage": 1,
    }
    assert {name: defaults[name] for name in expected} == expected


def test_the_two_commands_are_nearly_one():
    sources = [
        (ROOT / name).read_text().splitlines()
        for name in ("train_fsdp.py", "train_deepspeed.py")
    ]
    assert all(len(lines) <= 40 for lines in sources)
    assert sum(a != b for a, b in zip(*sources, strict=True)) <= 5


def test_demo_then_file_then_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("tp_size: 2\nbatch_size: 2\nmax_steps: 7\nlearning_rate: 1.0e-3\n")
    store = ["--storage_path", str(tmp_path)]
    given = parse("fsdp", "--offline_demo", "--config", str(file), *store)
    config = read_config(given)
    assert (config.tp_size, config.batch_size_per_gpu, config.max_steps) == (2, 2, 7)
    assert (config.seq_length, config.device) == (128, "cpu")  # the demo's
    flags = ["--max_steps", "9", "--seq_length", "64", "--pack", "none"]
    given = parse("fsdp", "--offline_demo", "--config", str(file), *store, *flags)
    config = read_config(given)
    assert (config.max_steps, config.seq_length, config.pack) == (9, 64, "none")


def test_numbers_of_yaml_are_numbers(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("tp_size: 2\nlearning_rate: 1e-5\nwarmup_steps: 1E-1\n")
    config = read_config({"config": str(file)})
    assert (config.learning_rate, config.warmup_steps) == (1e-5, 0.1)
    file.write_text("tp_size: 2\nlearning_rate: fast\n")
    with pytest.raises(ConfigError, match="learning_rate='fast' must be a valid"):
        read_config({"config": str(file)})


def test_a_setting_that_went_may_stay_in_a_file_at_its_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("tp_size: 2\nz_loss: 0.0\nreport_to: null\n")
    assert read_config({"config": str(file)}).tp_size == 2
    file.write_text("tp_size: 2\nz_loss: 1.0e-4\n")
    with pytest.raises(ConfigError, match=r"z_loss=0.0001 in .* must be left out"):
        read_config({"config": str(file)})


def test_flags_as_people_type_them():
    for flag in ("--batch_size", "--batch_size_per_gpu", "--batch-size"):
        assert parse("fsdp", flag, "4") == {"batch_size_per_gpu": 4}
    for flag in ("--no-async_checkpoint", "--no_async_checkpoint"):
        assert parse("fsdp", flag) == {"async_checkpoint": False}
    name = parse("fsdp", "--model-name", "some-model", "--run-name=a-b")
    assert name == {"model_name": "some-model", "run_name": "a-b"}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--lerning_rate", "1"], "--lerning_rate; did you mean --learning_rate?"),
        (["--zero_stage=1"], "--zero_stage is a flag of the other engine's"),
        (["--warmup_ratio", "0.1"], "--warmup_ratio is no flag any more"),
        (["--tp_size", "two"], "argument --tp_size: invalid int value: 'two'"),
        (["--eval", "3"], "--eval could match --eval_dataset, --eval_split"),
        (["--max_steps"], "argument --max_steps: expected one argument"),
        (["train"], "unknown argument train; did you mean"),
    ],
)
def test_a_mistyped_flag_gets_one_line(argv, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("fsdp", *argv)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


def test_usage_is_short(capsys):
    with pytest.raises(SystemExit):
        parse("fsdp", "--help")
    usage = capsys.readouterr().out.split("\n\n")[0]
    assert usage.count("\n") < 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "tp_size must be given"),
        (
            ["--tp_size", "3", "--seq_length", "126"],
            "tp_size=3 must divide the 4 key-value heads",
        ),
        (["--tp_size", "2", "--num_workers", "3"], "num_workers=3 must equal"),
        (["--tp_size", "2", "--config", "none.yaml"], "must be a YAML file"),
        (["--tp_size", "2", "--pip", "gone"], "pip='gone' must be a requirements file"),
        (
            ["--tp_size", "2", "--resume_from", "gone"],
            "resume_from='gone' must be a run",
        ),
        (
            ["--tp_size", "2", "--resume_from", "old", "--run_name", "new"],
            "run_name='new' cannot be combined with resume_from='old'",
        ),
        (
            ["--tp_size", "2", "--zero_stage", "5"],
            "zero_stage=5 must be less than",
        ),
        (
            ["--tp_size", "2", "--partition_config", "mixtral"],
            "must match the name of a weight",
        ),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(argv, sentence, tmp_path, capsys):
    demo = ["--offline_demo", "--storage_path", str(tmp_path)]
    assert cli.main("autotp", "", [*demo, *argv]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert sentence in said[0]


def test_unknown_names_are_met_with_known_ones(tmp_path, demo_paths):
    config = TrainConfig(demo_paths[0], storage_path=str(tmp_path), seq_length=128)
    file = tmp_path / "run.yaml"
    file.write_text("tp_sise: 2\n")
    with pytest.raises(ConfigError, match=r"'tp_sise' in config=.* try 'tp_size'"):
        read_config({"config": str(file)})
    (tmp_path / "first" / "checkpoint-000002").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"resume_from='frist' .* try first"):
        check_run_exists(replace(config, run_name="frist"))


def test_the_first_failure_is_told():
    class Failed(Exception):
        worker_failures = {  # noqa: RUF012
            0: RuntimeError("RankFailed: 12.5 node-a RuntimeError: Connection closed"),
            3: RuntimeError("x\nlaunch.RankFailed: 12.1 node-b ValueError: the cause"),
        }

    assert failures.first(Failed()) == "rank 3 on node-b: ValueError: the cause"
    assert failures.raised(Failed())
    error, lost = Failed(), "RuntimeError: [pair.cc] Connection closed by peer [::1]: x"
    error.worker_failures = {1: failures.RankFailed(f"12.5 node-a {lost}")}
    told = (
        "rank 1 on node-a: RuntimeError: [pair.cc] Connection closed by peer: another"
    )
    assert failures.first(error).startswith(told)
    assert not failures.raised(error)  # a process died
    error.worker_failures = {1: failures.RankFailed("12.5 node-a PlanError: no plan")}
    assert failures.is_permanent(error)
    error.worker_failures = {1: TimeoutError()}  # of a thread that writes
    assert failures.first(error) == "rank 1: TimeoutError: "
    argv = ["--tp_size", "2", "--run_name", "mine", "--resume_from=old"]
    assert cli.without(argv, ("--run_name", "--resume_from")) == argv[:2]


def test_a_run_that_was_interrupted_ends_exactly(tmp_path, pools):
    """By Ctrl-C, which reaches all of its terminal; then the command it prints.

    It evaluates and exports besides, which changes no training.
    """
    flags = ["--max_steps", "30", "--run_name", "cut", "--async_checkpoint"]
    given = parse("fsdp", "--offline_demo", "--tp_size", "2", *flags)
    config = read_config(given | {"storage_path": str(tmp_path)})
    config = launch.prepare(fsdp.check(config))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pools(2).run(train_without_ray, "fsdp", config, str(whole))

    model = tmp_path / "model"
    more = ["--eval_every", "15", "--export_to", os.path.relpath(model)]
    run = commands.start("train_fsdp.py", tmp_path, *flags, *more)
    assert any("] step " in line for line in run.stdout), run.stderr.read()
    commands.wait_for(lambda: commands.last(cut), run)
    os.killpg(run.pid, signal.SIGINT)
    out, err = commands.finish(run, code=1)
    step = int(re.search(r"^stopped: SIGINT after step (\d+)$", err, re.M)[1])
    assert f"SIGINT: finishing step {step}, then saving" in out
    assert f"last checkpoint: {cut}/checkpoint-{step:06d}\n" in err
    assert f"to resume: python {ROOT}/train_fsdp.py --offline_demo" in err

    out, _ = commands.finish(commands.resume(err))
    assert f"resumed after step {step}" in out
    assert "step 30/30" in out
    assert re.search("^done: step 30, loss [0-9.]+, .*checkpoint-000030$", out, re.M)
    assert out.endswith(f"curves: tensorboard --logdir {cut}/tensorboard\n")
    assert commands.shards(cut / "checkpoint-000030") == commands.shards(whole)
    starts = list(yaml.safe_load_all((cut / "config.yaml").read_text()))
    assert [(each["tp_size"], each["run_name"]) for each in starts] == [(2, "cut")] * 2

    state = json.loads((cut / "checkpoint-000030" / "trainer_state.json").read_text())
    history = state["history"]
    losses = {r["step"]: r["eval_loss"] for r in history if "eval_loss" in r}
    assert losses.keys() == {15, 30}
    assert f"step 30: eval_loss {losses[30]:.4f}" in out
    assert losses[30] < losses[15]
    events = EventAccumulator(str(cut / "tensorboard")).Reload()
    written = {e.step: e.value for e in events.Scalars("eval/loss")}
    assert written == pytest.approx(losses)
    assert f"exported to {model} in float32" in out
    assert f"| 30 | {history[-1]['loss']:.4f} |" in (model / "README.md").read_text()
    write = pipeline("text-generation", model=str(model))
    (answer,) = write("The", min_new_tokens=5, max_new_tokens=5)
    assert len(answer["generated_text"]) > len("The")
    assert write.model.num_parameters() == 1_058_496


INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(name, *_):
        if name == "tp2d_lib.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
# As in a terminal: what a shell starts in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train_fsdp.py", "train_deepspeed.py"])
def test_ctrl_c_during_imports_shows_no_traceback(script):
    command = [sys.executable, "-c", INTERRUPTED, str(ROOT / script), "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (-signal.SIGINT, "")


def test_deepspeed_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("tp2d_lib.autotp")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main("autotp", "", ["--offline_demo", "--tp_size", "2"]) == 2
    assert "must find the package deepspeed" in capsys.readouterr().err
