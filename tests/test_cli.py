"""The two commands: every field a flag, exit codes, resume after SIGKILL."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tp2d_lib import checkpoint, cli
from tp2d_lib.config import ConfigError, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = {  # a flag's text and the value it must become, where one text does not do
    "optimizer": "sgd",
    "lr_scheduler_type": "constant",
    "device": "cpu",
    "dtype": "float32",
    "tp_preset": "llama",
}


def parse(engine, *argv):
    return vars(cli.build_parser(engine, "").parse_args(argv))


@pytest.mark.parametrize("field", fields(TrainConfig), ids=lambda f: f.name)
def test_every_field_has_a_flag_that_carries_its_value(field):
    flag = f"--{cli.FLAGS.get(field.name, field.name)}"
    if isinstance(field.default, bool):
        assert parse("autotp", flag) == {field.name: True}
        assert parse("autotp", f"--no-{flag[2:]}") == {field.name: False}
        return
    text = SAMPLES.get(field.name, "3")
    (name, value), *others = parse("autotp", flag, text).items()
    assert (name, str(value).removesuffix(".0"), others) == (field.name, text, [])
    known = (str, int) if field.default is None else (type(field.default), int)
    assert type(value) in known


def test_only_deepspeed_has_its_fields():
    helps = {f.name: f.metadata["help"] for f in fields(TrainConfig)}
    only = {name for name, text in helps.items() if text.startswith("DeepSpeed: ")}
    flags = [
        {action.dest for action in cli.build_parser(engine, "")._actions}
        for engine in ("autotp", "fsdp")
    ]
    assert flags[0] - flags[1] == only
    assert "zero_stage" in only


def test_published_defaults():
    defaults = {f.name: f.default for f in fields(TrainConfig)} | cli.DEFAULTS
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
    config = cli.read_config(given)
    assert (config.tp_size, config.batch_size_per_gpu, config.max_steps) == (2, 2, 7)
    assert (config.seq_length, config.device) == (128, "cpu")  # the demo's
    flags = ["--max_steps", "9", "--seq_length", "64", "--no-pack"]
    given = parse("fsdp", "--offline_demo", "--config", str(file), *store, *flags)
    config = cli.read_config(given)
    assert (config.max_steps, config.seq_length, config.pack) == (9, 64, False)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "tp_size must be given"),
        (["--tp_size", "3"], "tp_size=3 must divide the 4 key-value heads"),
        (["--tp_size", "2", "--num_workers", "3"], "num_workers=3 must equal"),
        (["--tp_size", "2", "--config", "none.yaml"], "must be a YAML file"),
        (
            ["--tp_size", "2", "--resume_from", "gone"],
            "resume_from='gone' must be a run",
        ),
        (["--tp_size", "2", "--zero_stage", "5"], "zero_stage=5 must be 0, 1, 2 or 3"),
        (
            ["--tp_size", "2", "--tp_preset", "mixtral"],
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


def test_unknown_names_are_met_with_known_ones(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("tp_sise: 2\n")
    with pytest.raises(ConfigError, match=r"'tp_sise' in config=.* try 'tp_size'"):
        cli.read_config({"config": str(file)})
    (tmp_path / "first" / "checkpoint-000002").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"resume_from='frist' .* try first"):
        cli.check_run_exists(tmp_path, "frist")


def test_the_first_failure_is_told_and_the_command_that_goes_on(tmp_path, monkeypatch):
    class Failed(Exception):
        worker_failures = {  # noqa: RUF012
            0: RuntimeError("RankFailed: 12.5 node-a RuntimeError: Connection closed"),
            3: RuntimeError("x\nlaunch.RankFailed: 12.1 node-b ValueError: the cause"),
        }

    assert cli.first_failure(Failed()) == "rank 3 on node-b: ValueError: the cause"
    (tmp_path / "mine" / "checkpoint-000004").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["train_fsdp.py"])
    argv = ["--tp_size", "2", "--run_name", "mine", "--resume_from=old"]

    class Config:
        storage_path, run_name = str(tmp_path), "mine"

    said = cli.report(Failed(), Config, argv)
    assert "checkpoint-000004" in said
    assert said.endswith("python train_fsdp.py --tp_size 2 --resume_from mine")


def start(script, storage, *flags):
    """A command of its own, in its own session, on the demo."""
    command = [sys.executable, str(ROOT / script), "--offline_demo", "--tp_size", "2"]
    command += ["--storage_path", str(storage), "--checkpoint_every", "2"]
    return subprocess.Popen(
        [*command, "--log_interval", "2", *flags],
        env={**os.environ, "RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process, seconds=150):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.05)


def test_resume_after_sigkill_of_the_driver_is_exact(tmp_path):
    steps = ["--max_steps", "12"]
    whole = start("train_fsdp.py", tmp_path, *steps, "--run_name", "whole")
    out, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    assert "step 12/12" in out
    assert "done: step 12" in out
    stored = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert (stored["tp_size"], stored["run_name"]) == (2, "whole")

    cut = start("train_fsdp.py", tmp_path, *steps, "--run_name", "cut")
    wait_for(lambda: list((tmp_path / "cut").glob("checkpoint-*/.metadata")), cut)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    assert not (tmp_path / "cut" / "checkpoint-000012").exists()

    again = start("train_fsdp.py", tmp_path, *steps, "--resume_from", "cut")
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert "resumed after step" in out
    last = "checkpoint-000012"
    sums = [checkpoint.checksums(tmp_path / run / last) for run in ("whole", "cut")]
    shards = [name for name in sums[0] if name.endswith(".distcp")]
    assert len(shards) == 2
    for name in shards:
        assert sums[0][name] == sums[1][name]


def workers_of(pid):
    """The training processes that a driver's Ray cluster has started."""
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True
    ).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    family, grown = {str(pid)}, True
    while grown:
        more = {child for child, parent, _ in rows if parent in family} - family
        family, grown = family | more, bool(more)
    return [int(p) for p, _, args in rows if p in family and "RayTrainWorker" in args]


def test_failed_training_ends_with_1_and_says_how_to_go_on(tmp_path):
    flags = ["--max_failures", "0", "--max_steps", "500", "--run_name", "lost"]
    run = start("train_deepspeed.py", tmp_path, *flags)
    wait_for(lambda: list((tmp_path / "lost").glob("checkpoint-*/latest")), run)
    os.kill(workers_of(run.pid)[-1], signal.SIGKILL)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 1
    assert re.search(r"^failed: rank \d", err, re.MULTILINE)
    assert re.search(r"^last checkpoint: .*lost/checkpoint-\d{6}$", err, re.MULTILINE)
    assert re.search(r"^to go on: python .* --resume_from lost$", err, re.MULTILINE)
    assert "Traceback" not in err
