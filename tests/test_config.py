"""A bad setting is refused in one sentence: field, value, rule, a value that works."""

import ast
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import write_model
from tp2d_lib import fsdp
from tp2d_lib.autotp import preflight as autotp
from tp2d_lib.config import FIELDS, ConfigError, TrainConfig
from tp2d_lib.run import placement
from tp2d_lib.validation import READ_BY, choices, leaves

NAMES = ("model_name", "dataset_name", "eval_dataset")
PATHS = ("prepared_data", "prepared_eval_data", "storage_path", "cache_dir")
PATHS += ("resume_from_checkpoint", "export_to")
NUMBERS = [
    name for name, field in FIELDS.items() if {int, float} & {*leaves(field.annotation)}
]


@pytest.fixture
def make(demo_paths, tmp_path):
    """``make(**settings)``: a config of the demo model."""
    model, dataset = demo_paths
    base = {"model_name": model, "dataset_name": dataset, "seq_length": 128}
    base |= {"storage_path": str(tmp_path)}
    return lambda **settings: TrainConfig(**{**base, **settings})


@pytest.fixture
def check(make):
    """``check(**settings)``: the same, and what the driver finds out about it."""
    return lambda **settings: fsdp.check(make(**settings))


def refuse(make, **settings) -> str:
    """The sentence that refuses these settings."""
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refuse_field(make, field: str, value, rule: str, **others) -> str:
    message = refuse(make, **{field: value}, **others)
    assert message.startswith(f"{field}={value!r}"), message
    assert rule in message
    return message


def proposal(message: str):
    """The value that is proposed: a number, a text, a tuple of sizes, or None."""
    if message.endswith("; leave it out"):
        return None
    text = re.search(r"try (?:one of |\w+=)?(.*?)$", message)[1]
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 10**999, "1", True])
@pytest.mark.parametrize("field", NUMBERS)
def test_no_number_of_the_range(make, field, value):
    read_by = {"lora_rank": 8} if field.startswith("lora_") else {}
    message = refuse(make, **read_by | {field: value})
    assert message.startswith(f"{field}=")
    assert " must be " in message
    make(**read_by | {field: proposal(message)})


@pytest.mark.parametrize(
    ("field", "rule"),
    {
        "tp_size": "greater than 0",
        "max_steps": "greater than 0",
        "learning_rate": "greater than 0",
        "dataset_percentage": "greater than 0",
        "seq_length": "greater than or equal to 2",
    }.items(),
)
def test_zero(make, field, rule):
    message = refuse_field(make, field, 0, f"must be {rule}")
    make(**{field: proposal(message)})


@pytest.mark.parametrize(
    ("field", "limit", "rule"),
    [
        ("dataset_percentage", 100, "less than or equal to 100"),
        ("min_lr_ratio", 1, "less than or equal to 1"),
        ("zero_stage", 3, "less than or equal to 3"),
    ],
)
def test_the_highest(make, field, limit, rule):
    make(**{field: limit})
    message = refuse_field(make, field, limit + 1, f"must be {rule}")
    make(**{field: proposal(message)})


@pytest.mark.parametrize("field", ["eval_fraction", "adam_beta1", "adam_beta2"])
def test_below_one(make, field):
    make(**{field: 0})
    message = refuse_field(make, field, 1, "must be less than 1")
    make(**{field: proposal(message)})


def test_chunked_loss_in_float16(make):
    half = {"dtype": "float16"}
    message = refuse_field(make, "loss_chunk_tokens", 512, "dtype='float16'", **half)
    make(loss_chunk_tokens=proposal(message), **half)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("tp_size", None, "integer"),
        ("dp_size", 2.0, "integer"),
        ("pack", 1, "'auto', 'documents', 'stream' or 'none'"),
        ("partition_config", 3, "string"),
        ("text_column", 1, "string"),
        ("cache_dir", Path("/data"), "string"),
        ("compile", 1, "boolean"),
    ],
)
def test_wrong_type(make, field, value, kind):
    message = refuse_field(make, field, value, " must be ")
    assert kind in message
    make(**{field: proposal(message)})


def test_no_such_field(make):
    message = refuse_field(make, "tp_siz", 2, "must be a field of TrainConfig")
    assert proposal(message) == "tp_size"


def test_whole_number_is_a_float(make):
    config = make(learning_rate=1, dataset_percentage=50)
    assert isinstance(config.learning_rate, float)
    assert isinstance(config.dataset_percentage, float)


@pytest.mark.parametrize(
    ("workers", "dp_size", "tp_size"), [(3, 1, 1), (4, 2, 1), (2, 2, 2), (16, 4, 2)]
)
def test_mesh_not_as_large_as_workers(make, workers, dp_size, tp_size):
    sizes = {"dp_size": dp_size, "tp_size": tp_size}
    message = refuse_field(
        make,
        "num_workers",
        workers,
        f"tp_size * dp_size = {tp_size} * {dp_size}",
        **sizes,
    )
    assert make(num_workers=proposal(message), **sizes) == make(**sizes)


def test_copies_do_not_divide_dp(make):
    message = refuse_field(make, "dp_replicate_size", 4, "divide dp_size=6", dp_size=6)
    make(dp_replicate_size=proposal(message), dp_size=6)


@pytest.mark.parametrize("tp_size", [3, 8, 64])
def test_tp_size_does_not_divide_heads(check, demo_paths, tp_size):
    length = {"seq_length": 192}
    message = refuse_field(check, "tp_size", tp_size, "4 key-value heads", **length)
    assert "8 query heads" in message
    assert demo_paths[0] in message
    assert proposal(message) == (1, 2, 4)
    for allowed in proposal(message):
        check(tp_size=allowed)


def test_tp_size_divides_both_kinds_of_heads(check, tmp_path):
    from transformers import Qwen2Config

    grouped = Qwen2Config(num_attention_heads=12, num_key_value_heads=6)
    grouped.save_pretrained(tmp_path)
    message = refuse_field(check, "tp_size", 4, "6 key-value", model_name=str(tmp_path))
    assert proposal(message) == (1, 2, 3, 6)


@pytest.mark.parametrize("value", [130, 127, 2])
def test_positions_that_cannot_be_shared_out(make, check, value):
    rule = "divisible by tp_size=4"
    message = refuse_field(check, "seq_length", value, rule, tp_size=4)
    check(seq_length=int(re.search(r"try (\d+), or", message)[1]), tp_size=4)
    assert message.endswith("or sequence_parallel='never'")
    check(seq_length=value, tp_size=4, sequence_parallel="never")
    autotp.check(make(seq_length=value, tp_size=4))


@pytest.mark.parametrize(("value", "tp_size"), [(1025, 1), (4096, 2), (2052, 4)])
def test_seq_length_longer_than_model(check, demo_paths, value, tp_size):
    message = refuse_field(check, "seq_length", value, "at most 1024", tp_size=tp_size)
    assert demo_paths[0] in message
    check(seq_length=proposal(message), tp_size=tp_size)


def test_sequence_parallel_for_a_model_that_makes_masks(check, demo_paths, tmp_path):
    path = write_model("mistral", tmp_path)
    for file in Path(demo_paths[0]).glob("tokenizer*"):
        shutil.copy(file, path)
    windowed = {"model_name": path, "tp_size": 2, "seq_length": 128}
    refuse_field(check, "sequence_parallel", "always", "without a mask", **windowed)
    check(sequence_parallel="auto", **windowed)
    check(sequence_parallel="always", **windowed | {"seq_length": 64})  # its window


@pytest.mark.parametrize("field", READ_BY)
def test_a_setting_that_nothing_reads(make, field):
    reader, values = READ_BY[field]
    others = {"optimizer": "sgd", "lr_scheduler_type": "constant"}
    message = refuse_field(make, field, 0.5, f"{reader} ", **{reader: others[reader]})
    assert message.endswith(f"try {reader}={values[0]!r}")
    make(**{field: 0.5, reader: values[0]})


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        ("optimizer", "adam", "adamw"),
        ("optimizer", "sgdd", "sgd"),
        ("optimizer", "SGD", "sgd"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("device", "gpu", "cuda"),
        ("lr_scheduler_type", "constnat", "constant"),
        ("dtype", "bf16", "bfloat16"),
        ("dtype", "flaot32", "float32"),
    ],
)
def test_unknown_choice(make, field, value, meant):
    message = refuse_field(make, field, value, "must be ")
    assert all(repr(each) in message for each in choices(FIELDS[field].annotation))
    assert proposal(message) == meant
    make(**{field: meant})


def test_model_directory_without_config(check, tmp_path):
    message = refuse_field(check, "model_name", str(tmp_path), "no config.json")
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    "text", ["{broken", "{}", json.dumps({"model_type": "mamba"})], ids=repr
)
def test_model_that_cannot_be_used(check, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refuse_field(check, "model_name", str(tmp_path), "must")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("no-such/model", "HF_HUB_OFFLINE=0"), ("/no/such/folder", "'Qwen/Qwen2.5-0.5B'")],
)
def test_model_that_does_not_exist(check, name, remedy):
    message = refuse_field(check, "model_name", name, "a model on the Hub")
    assert f"try {remedy}" in message


def test_remote_storage_needs_a_cache_dir(make):
    remote = {"storage_path": "s3://bucket/runs"}
    message = refuse_field(make, "cache_dir", None, "every node sees", **remote)
    assert "storage_path='s3://bucket/runs'" in message
    config = make(cache_dir=proposal(message), **remote)
    assert str(config.data_dir) == proposal(message)


def test_data_dir_is_under_local_storage(make):
    assert make(storage_path="/runs").data_dir == Path("/runs/data")


def test_frozen(make):
    config = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tp_size = 2


def test_num_workers_and_global_batch_are_filled_in(make):
    config = make(
        tp_size=2, dp_size=3, batch_size_per_gpu=5, gradient_accumulation_steps=7
    )
    assert config.num_workers == 6
    assert config.global_batch_size == 3 * 5 * 7  # the tp ranks of a row share rows


@pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext"])
def test_wikitext_has_a_configuration(make, name):
    config = make(dataset_name=name)
    assert config.dataset_name == "Salesforce/wikitext"
    assert config.dataset_config == "wikitext-2-raw-v1"
    other = make(dataset_name=name, dataset_config="wikitext-103-v1")
    assert other.dataset_config == "wikitext-103-v1"


def test_every_field_explains_itself():
    for name, field in FIELDS.items():
        assert field.description.strip(), name
        allowed = choices(field.annotation)
        assert not allowed or field.default in (*allowed, None)


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("field", ["model_name", "storage_path", "text_column"])
def test_empty_text(make, field, value):
    message = refuse_field(make, field, value, "must not be empty")
    make(**{field: proposal(message)})


@pytest.mark.parametrize("written", ["runs", "./runs", "../runs", "~/runs"])
@pytest.mark.parametrize("field", [*PATHS, "partition_config"])
def test_local_paths_are_absolute(make, tmp_path, monkeypatch, field, written):
    """Ray changes a worker's directory: a relative path would mean something else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = make(**{field: written})
    expected = {
        "runs": tmp_path / "runs",
        "./runs": tmp_path / "runs",
        "../runs": tmp_path.parent / "runs",
        "~/runs": "/home/someone/runs",
    }[written]
    assert getattr(config, field) == str(expected)
    monkeypatch.chdir("/")
    assert getattr(dataclasses.replace(config), field) == str(expected)


@pytest.mark.parametrize("field", NAMES)
def test_a_name_is_a_folder_where_it_is_written_as_one_or_is_there(
    make, tmp_path, monkeypatch, field
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "tiny").mkdir(parents=True)
    for given, expected in {
        "./gone": str(tmp_path / "gone"),
        "mine/tiny": str(tmp_path / "mine/tiny"),
        "someone/tiny": "someone/tiny",  # of the Hub
        "hf://datasets/someone/tiny": "hf://datasets/someone/tiny",
    }.items():
        assert getattr(make(**{field: given}), field) == expected


@pytest.mark.parametrize(
    "field", ["storage_path", "resume_from_checkpoint", "export_to"]
)
def test_remote_paths_stay(make, field):
    config = make(**{"cache_dir": "/data", field: "s3://bucket/runs"})
    assert getattr(config, field) == "s3://bucket/runs"


def test_rules_as_text_are_no_path(make):
    text = ' {"layer_specs": []}'
    assert make(partition_config=text).partition_config == text


TOUCHED = """
import sys, time
from dataclasses import replace
from tp2d_lib.config import TrainConfig

config = replace(TrainConfig(), model_name="no-such/model", partition_config="r.json")
seen = []
sys.addaudithook(
    lambda name, args: seen.append((name, args))
    if name.split(".")[0] in ("open", "os", "socket", "subprocess", "import")
    else None
)
start = time.perf_counter()
for _ in range(100):
    replace(config, model_name="no-such/other", dataset_name="/gone", seed=7)
print((time.perf_counter() - start) / 100, file=sys.stderr)
print(seen)
print([name for name in ("torch", "transformers", "ray") if name in sys.modules])
"""


def test_making_a_config_opens_no_file_and_no_socket():
    """Of a model, a dataset and rules that are not there; nor is anything imported."""
    run = subprocess.run(
        [sys.executable, "-c", TOUCHED], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == ["[]", "[]"]
    assert float(run.stderr) < 0.01  # it takes about 0.1 ms


@pytest.mark.parametrize("field", ["storage_path", "cache_dir", "export_to"])
def test_a_folder_that_cannot_be_made(check, tmp_path, field):
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "x")
    message = refuse_field(check, field, inside, "must be a writable folder")
    assert proposal(message) == "/tmp/tp2d"


def test_a_model_without_safetensors(check, demo_paths, tmp_path):
    shutil.copytree(demo_paths[0], tmp_path / "m")
    for file in (tmp_path / "m").glob("*.safetensors"):
        file.unlink()
    refuse_field(check, "model_name", str(tmp_path / "m"), "must hold safetensors")


def test_min_dp_size(make):
    """Fewer dp ranks read the same samples in more micro-batches."""
    config = make(dp_size=4, min_dp_size=1, gradient_accumulation_steps=3, tp_size=2)
    widths = placement.widths(config)
    found = [(w.dp_size, w.gradient_accumulation_steps, w.num_workers) for w in widths]
    assert found == [(4, 3, 8), (3, 4, 6), (2, 6, 4), (1, 12, 2)]
    assert {width.global_batch_size for width in widths} == {config.global_batch_size}
    for settings, error in (
        ({"dp_size": 2, "min_dp_size": 3}, "min_dp_size=3 must be at most dp_size=2"),
        (
            {"dp_size": 2, "min_dp_size": 1, "dp_replicate_size": 2},
            "copies a lost node",
        ),
        ({"min_dp_size": 0}, "min_dp_size=0 must be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=error):
            make(**settings)
    with pytest.raises(ConfigError, match="min_dp_size=1 must be combined with optim"):
        autotp.check_precision(make(dp_size=2, min_dp_size=1, zero_stage=0))
