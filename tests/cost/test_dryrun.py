"""A dry run predicts what live ranks then hold and send."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from tests.support.models import write_model
from tests.support.parity import the_mesh
from tp2d_lib import cli, data, presets
from tp2d_lib.config import TrainConfig
from tp2d_lib.cost import dryrun, meshes, times
from tp2d_lib.run import gpus

CASES = {  # engine, model, (tp_size, dp_size), settings
    "fsdp": ("fsdp", "qwen2-tied", (2, 2), {"dtype": "bfloat16"}),
    "fsdp-recomputed": (
        "fsdp",
        "llama",
        (4, 1),
        {"gradient_accumulation_steps": 2, "activation_checkpointing": "full"},
    ),
    "fsdp-selective": (
        "fsdp",
        "qwen3",
        (2, 2),
        {"activation_checkpointing": "selective", "pack": "documents"},
    ),
    "fsdp-lora": (
        "fsdp",
        "llama",
        (2, 2),
        {"lora_rank": 8, "dtype": "bfloat16", "activation_checkpointing": "full"},
    ),
    "fsdp-windows": ("fsdp", "gemma3", (1, 4), {}),
    "fsdp-masks": ("fsdp", "gemma2", (2, 2), {}),
    "fsdp-copies": (
        "fsdp",
        "qwen2-tied",
        (1, 4),
        {"dp_replicate_size": 2, "gradient_accumulation_steps": 2},
    ),
    "fsdp-gathered": (
        "fsdp",
        "llama",
        (1, 4),
        {
            "gradient_accumulation_steps": 2,
            "reshard_after_forward": False,
        },
    ),
    "zero-0": ("autotp", "qwen3", (2, 2), {"zero_stage": 0}),
    "zero-1": ("autotp", "llama", (2, 2), {"dtype": "bfloat16"}),
    "zero-2": (
        "autotp",
        "qwen2-tied",
        (2, 2),
        {"zero_stage": 2, "gradient_accumulation_steps": 2, "pack": "documents"},
    ),
    "zero-3": (
        "autotp",
        "llama",
        (2, 2),
        {
            "zero_stage": 3,
            "gradient_accumulation_steps": 2,
            "activation_checkpointing": "full",
        },
    ),
}


def measure(engine, config):
    """Run by every rank: what it holds and sends, on real tensors."""
    from tp2d_lib import autotp, fsdp
    from tp2d_lib.cost import memory
    from tp2d_lib.cost.comm import DP, CommBytes

    build, rank_bytes = {
        "fsdp": (fsdp.build_engine, memory.fsdp_rank_bytes),
        "autotp": (autotp.build_engine, memory.autotp_rank_bytes),
    }[engine]
    mesh = the_mesh(config.dp_size, config.tp_size)
    with memory.LiveBytes() as live:
        built = build(config, mesh)
    generator = torch.Generator().manual_seed(mesh["dp"].get_local_rank())
    shape = (config.batch_size_per_gpu, config.seq_length)
    ids = torch.randint(500, shape, generator=generator)
    micro = {"input_ids": ids, "labels": ids}
    if config.pack == "documents":
        micro["position_ids"] = torch.arange(config.seq_length).expand(shape) % 20
    batch = [micro] * config.gradient_accumulation_steps
    built.gradients_checked = True  # its collective belongs to the first step
    counted = CommBytes(mesh, built.model)
    live.model = built.model
    with live:
        held = rank_bytes(built, batch)
        with counted as sent:
            steps = [peaks(live, built, batch)]
        steps += [peaks(live, built, batch) for _ in range(4)]
    # gloo's thread may let go of what it has sent late, so the least of five steps
    return held | {
        **{name: min(step[name] for step in steps) for name in steps[0]},
        "tp": sent.sent("tp"),
        "dp": sent.sent(*DP),
        "dp_replicate": sent.sent("dp_replicate"),
    }


REFUSED_PLANS = {
    "--plan_gpu H100": "plan_gpu=H100 needs plan_mesh; try --plan_mesh 8",
    "--plan_mesh 8 --plan_network 50": "plan_network=50.0 needs plan_gpu; try",
    "--plan_mesh 8 --plan_gpu H10": "plan_gpu=H10 must be one of",
    "--plan_mesh 8 --plan_gpu H100 --plan_gpus_per_node 0": "=0 must be positive",
    "--plan_mesh 8 --gpu_hour_price 2": "gpu_hour_price=2.0 needs plan_gpu; try",
}


def peaks(live, built, batch):
    live.most.clear()
    built.step(batch)
    return {**live.most, "activations": live.activations}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        case: TrainConfig(
            model_name=write_model(model, folder),
            tp_size=tp_size,
            dp_size=dp_size,
            seq_length=64,
            batch_size_per_gpu=2,
            storage_path=str(folder),
            device="cpu",
            **settings,
        )
        for case, (_, model, (tp_size, dp_size), settings) in CASES.items()
    }


@pytest.fixture(scope="module")
def predictions(configs):
    with ThreadPoolExecutor(2) as threads:
        asked = {
            case: threads.submit(dryrun.predict, CASES[case][0], configs[case])
            for case in CASES
        }
        return {case: future.result() for case, future in asked.items()}


@pytest.mark.parametrize("case", CASES)
def test_prediction_is_what_a_rank_then_holds(case, configs, predictions, pools):
    engine = CASES[case][0]
    # DTensor takes the groups of the first mesh in a process for those of its equals.
    pool = case if case in ("fsdp-selective", "fsdp-masks") else engine
    ranks = pools(4, pool).run(measure, engine, configs[case])
    predicted = predictions[case]
    for name in ("parameters", "gradients", "optimizer"):
        assert predicted[name] == max(rank[name] for rank in ranks), name
    masks = case in ("fsdp-windows", "fsdp-masks")  # which only a real run keeps
    for name in ("activations", *dryrun.PHASES):
        measured = max(rank[name] for rank in ranks)
        close = pytest.approx(measured, rel=0.06 if masks else 0.01)
        assert predicted[name] == close, name
    for name in ("tp", "dp", "dp_replicate"):
        assert predicted[name] == pytest.approx(ranks[0][name], rel=0.01), name


@pytest.mark.ranks
def test_the_command_tells_and_stops(tmp_path, capsys):
    demo = ["--offline_demo", "--storage_path", str(tmp_path), "--tp_size", "2"]
    run = ["--dp_size", "2", "--device", "cuda", "--dry_run", "--run_name", "asked"]
    run += ["--eval_every", "10", "--async_checkpoint"]
    try:
        assert cli.main("fsdp", "", [*demo, *run]) == 0
    finally:
        ray.shutdown()
    page, notes = capsys.readouterr()
    assert "note: num_workers=4 must not exceed the cluster's 0 GPUs" in notes
    assert re.search(r"dp 1 +2 +3$", page, re.MULTILINE)
    assert "parameters in the model: 1,058,496" in page
    assert re.search(r"^  parameters +1.06 MB$", page, re.MULTILINE)
    assert "1,004 rows of 128 tokens, 128,432 tokens without padding" in page
    assert "40 steps of 8 rows, 0.32 epochs" in page
    assert re.search(
        r"^\d+ held-out rows, evaluated every 10 steps$", page, re.MULTILINE
    )
    assert not (tmp_path / "asked").exists()


@pytest.mark.ranks
def test_meshes_are_compared(tmp_path, capsys):
    """Those that the model allows; each line is that of a dry run."""
    demo = ["--offline_demo", "--storage_path", str(tmp_path)]
    try:
        assert cli.main("fsdp", "", [*demo, "--plan_mesh", "0"]) == 2
        refused = [*demo, "--plan_mesh", "3", "--seq_length", "4096"]
        assert cli.main("fsdp", "", refused) == 2
        said = capsys.readouterr().err
        for flags, rule in REFUSED_PLANS.items():
            assert cli.main("fsdp", "", [*demo, *flags.split()]) == 2
            assert rule in capsys.readouterr().err
        assert "error: plan_mesh=0 must be positive" in said
        assert "error: seq_length=4096 must be at most 1024" in said
        assert cli.main("fsdp", "", [*demo, "--plan_mesh", "8"]) == 0
        table = capsys.readouterr().out
        on_gpus = ["--plan_mesh", "4", "--plan_gpu", "h100", "--plan_network", "100"]
        on_gpus += ["--plan_gpus_per_node", "4"]
        assert cli.main("fsdp", "", [*demo, *on_gpus]) == 0
        said = capsys.readouterr()
        assert "cluster" not in said.err  # it asks none
        step, hours = re.search(
            r"^tp 2 x dp 2 .* (\S+) s +[\d,]+ +(\S+)$", said.out, re.MULTILINE
        ).groups()
        assert float(hours) == pytest.approx(40 * float(step) / 3600, rel=0.05)
        assert "hours are those of training: " in said.out
        assert "for 4 GPUs per node without a switch at 50%" in said.out
        assert "80% of a network's 12.5 GB/s" in said.out
        sizes = ["--tp_size", "2", "--dp_size", "4", "--dry_run"]
        assert cli.main("fsdp", "", [*demo, *sizes]) == 0
    finally:
        ray.shutdown()
    page = capsys.readouterr().out
    lines = {re.split("  +", line)[0]: line for line in table.splitlines()}
    assert list(lines)[-4:-1] == [f"tp {n} x dp {8 // n}" for n in (1, 2, 4)]
    assert "tp 8 x dp 1: tp_size=8 must divide the 4 key-value heads" in table
    *_, peak, tp, dp = re.split("  +", lines["tp 2 x dp 4"])
    assert f"one rank sends {tp} over tp and {dp} over dp" in page
    assert peak in re.findall(r"^  (?:forward|backward|update) +(.*)$", page, re.M)


def test_hours_and_cost_are_those_of_the_steps(capsys, tmp_path):
    """Of each mesh's own steps; without data there are none, and it says why."""
    settings = {"dp_size": 4, "max_steps": None, "device": "cuda"}
    config = presets.build_config("demo", str(tmp_path), **settings)
    config = replace(config, prepared_data=str(data.prepare(config)))
    cluster = times.Cluster(gpus.find("H100"))
    assert cli.plan_mesh("fsdp", config, lambda one: one, cluster, 1e6) == 0
    said = capsys.readouterr().out
    titles, _, *lines = (re.split("  +", line) for line in said.splitlines())
    rows = [dict(zip(titles, line, strict=True)) for line in lines if len(line) > 8]
    assert len(rows) > 1
    for row in rows:
        tp_size, dp_size = map(int, re.findall(r"\d+", row["mesh"]))
        one = replace(config, tp_size=tp_size, dp_size=dp_size)
        steps = data.BatchLoader(one, Path(config.prepared_data), dp_rank=0).steps_left
        hours = steps * float(row["step"].removesuffix(" s")) / 3600
        assert float(row["hours"]) == pytest.approx(hours, rel=0.05)
        cost = 1e6 * config.num_workers * hours
        assert float(row["cost"].replace(",", "")) == pytest.approx(cost, rel=0.05)
    gone = replace(config, prepared_data=None, dataset_name=str(tmp_path / "no.jsonl"))
    assert cli.plan_mesh("fsdp", gone, lambda one: one, cluster, None) == 0
    said = capsys.readouterr().out
    assert "no hours: dataset_name=" in said
    assert "cost" not in said.splitlines()[0]


def test_meshes_that_do_not_fit_are_named(configs):
    gpu = gpus.find("H100")._replace(memory=1.2e6)
    cluster = times.Cluster(gpu)
    rows, refused = meshes.compare("fsdp", configs["fsdp-recomputed"], cluster=cluster)
    assert [row["mesh"] for row in rows] == ["tp 4 x dp 1"]
    names = [line.partition(":")[0] for line in refused]
    assert names == ["tp 1 x dp 4", "tp 2 x dp 2"]
    assert all(line.endswith("of a GPU of 1.2 MB") for line in refused)


def test_sizes_are_for_people():
    sizes = [dryrun.size(count) for count in (12, 1_500, 3_808_114_688, 2e12)]
    assert sizes == ["12 B", "1.5 kB", "3.81 GB", "2 TB"]
