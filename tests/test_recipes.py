"""Every block of docs/recipes.md runs, on two ranks and with both engines."""

import gzip
import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from tests.support.demo import make_config
from tests.support.models import write_model
from tests.support.parity import MAX_GRAD_NORM
from tests.support.reference import train
from tp2d_lib import autotp, data, fsdp
from tp2d_lib.run import launch, loop

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
BLOCKS = re.findall(
    r"^## (.*?)$.*?^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S
)
COMMON = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
RECIPES = {"As it is": "", **dict(BLOCKS)}
STREAM = RECIPES.pop("Rows from Ray Data")  # which has a loop of its own
MOMENTS = "AdamW's moments in half the memory"  # with FSDP2 only
STEPS = 10


def run_recipe(engine: str, recipe: str, config):
    """Run by every rank: the block, then what the engine and the loop have seen."""
    seen, build = {"rates": [], "losses": []}, {"fsdp": fsdp, "autotp": autotp}[engine]

    def look(built, rows, config, **options):
        step = built.step

        def see(batch):
            groups = built.optimizer.param_groups
            seen["rates"].append([group["lr"] for group in groups])
            loss, norm = step(batch)
            seen["losses"].append((float(loss), float(norm)))
            return loss, norm

        built.step = see
        before = {name: w.clone() for name, w in built.local_weights().items()}
        loop.run(built, rows, config, **options)
        after = built.local_weights()
        seen["moved"] = [n for n, w in after.items() if not torch.equal(w, before[n])]

    code = f"{COMMON}\n{RECIPES[recipe]}".replace("fsdp", engine)
    names = {}
    exec(code, names)
    names["loop"] = type("Loop", (), {"run": staticmethod(look)})
    names[engine] = build
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(loop.checkpoint, "commit", lambda *_: None)  # it needs Ray
        patch.setenv("MLFLOW_TRACKING_URI", f"file://{config.storage_path}/mlflow")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        names["train_func"](config)
    return seen | {"said": said.getvalue()}


@pytest.fixture(scope="module")
def recipes(demo_paths, pools, tmp_path_factory):
    """``recipes(engine)``: what each recipe did, by its title, on the first rank."""
    found = {}

    def run(engine: str) -> dict:
        if engine not in found:
            folder = tmp_path_factory.mktemp(engine)
            config = make_config(demo_paths, folder, 2, 1, max_steps=STEPS)
            settings = {
                "log_interval": STEPS,
                "checkpoint_minutes": 0.0,
                "device": "cpu",
            }
            settings |= {"prepared_data": str(data.prepare(config)), "dtype": "float32"}
            config = replace(config, **settings)
            found[engine] = {"config": config} | {
                title: pools(2, engine).run(
                    run_recipe,
                    engine,
                    title,
                    replace(config, run_name=f"run-{number}"),
                )[0]
                | {"run": folder / f"run-{number}"}
                for number, title in enumerate(RECIPES)
                if engine == "fsdp" or title != MOMENTS
            }
        return found[engine]

    return run


@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_every_recipe_does_what_it_says(recipes, engine):
    done = recipes(engine)
    plain = done["As it is"]
    assert len(done) == 11 + (engine == "fsdp")
    assert len(plain["losses"]) == STEPS

    hotter = done["Change the loss"]
    assert abs(hotter["losses"][0][0] - plain["losses"][0][0]) > 1e-3

    if engine == "fsdp":
        small = done[MOMENTS]["losses"]
        assert small[:2] == plain["losses"][:2]  # rounding acts from the third on
        assert small != plain["losses"]

    frozen = done["Freeze layers"]["moved"]
    assert any(".layers.0." in name for name in plain["moved"])
    assert frozen == [name for name in plain["moved"] if ".layers.0." not in name]
    assert done["Freeze layers"]["losses"][0][1] < plain["losses"][0][1]

    rates = done["Your own parameter groups"]["rates"]
    assert all(slow == pytest.approx(fast / 10) for fast, slow in rates)

    losses, norms = zip(*done["Label smoothing and z-loss"]["losses"], strict=True)
    loss, norm = first_step(done["config"])
    assert losses[0] == pytest.approx(loss, rel=1e-5)
    assert norms[0] == pytest.approx(norm, rel=1e-4)
    assert losses[0] > plain["losses"][0][0] + 1e-3

    peak = done["config"].learning_rate
    rates = [rate for (rate, *_) in done["A schedule of your own"]["rates"]]
    assert rates == pytest.approx([*[peak] * (STEPS - 1), peak / 2], rel=1e-6)

    drawn = EventAccumulator(
        str(done["Another number in TensorBoard"]["run"] / "tensorboard")
    )
    (drawn,) = drawn.Reload().Scalars("own/size_of_weights")
    assert drawn.step == 10
    assert drawn.value > 1

    assert "half of the steps are done" in done["Something after each step"]["said"]
    assert "half of the steps" not in plain["said"]

    for rank in range(2):
        trace = done["A profile"]["run"] / f"rank{rank}.json.gz"
        names = [
            e.get("name", "")
            for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        ]
        assert sum(name.startswith("ProfilerStep") for name in names) == 3

    (run,) = done["MLflow, or another tracker"]["run"].parent.glob("mlflow/*/*/metrics")
    assert {path.name for path in run.iterdir()} >= {"loss", "grad_norm"}


def train_and_resume(config, batches):
    """Run by every rank: the last two losses, resumed before them, types of moments."""
    from tp2d_lib.mesh import build_mesh

    names = {}
    exec(f"{COMMON}\n{RECIPES[MOMENTS]}", names)
    mesh = build_mesh(config.dp_size, config.tp_size)

    def build(**options):
        return names["fsdp"].build_engine(config, mesh, **options)

    plain, first, second = (
        build(),
        *(build(build_optimizer=names["small_moments"]) for _ in range(2)),
    )
    rows = batches[mesh["dp"].get_local_rank()]
    usual = [float(plain.step(batch)[0]) for batch in rows]
    losses = [float(first.step(batch)[0]) for batch in rows[:3]]
    first.save(config.storage_path)
    losses += [float(first.step(batch)[0]) for batch in rows[3:]]
    second.load(config.storage_path)
    resumed = [float(second.step(batch)[0]) for batch in rows[3:]]
    states = second.optimizer.state.values()
    types = {
        state[name].dtype for state in states for name in ("exp_avg", "exp_avg_sq")
    }
    same = map(torch.equal, *(e.local_weights().values() for e in (first, second)))
    return usual, losses, resumed, types, all(same)


def test_small_moments_train_and_resume_bit_for_bit(demo_paths, pools, tmp_path):
    config = make_config(demo_paths, tmp_path, 2, 2)
    config = replace(config, device="cpu", dtype="float32")
    config = replace(config, prepared_data=str(data.prepare(config)))
    rows = [data.BatchLoader(config, Path(config.prepared_data), r) for r in range(2)]
    batches = [list(islice(each, 5)) for each in rows]
    for answer in pools(4).run(train_and_resume, config, batches):
        usual, losses, resumed, types, same = answer
        assert types == {torch.bfloat16}
        assert resumed == losses[3:]
        assert same
        assert losses[:2] == usual[:2]  # the moments' first rounding acts in the third
        assert losses != usual
        assert losses == pytest.approx(usual, rel=1e-3)


def losses_in_eval(path):
    """A model's validation loss without and with the recipe of a regularized one."""
    names = {}
    exec(f"{COMMON}\n{RECIPES['Label smoothing and z-loss']}", names)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.arange(20).view(1, -1)
    inputs = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(19)}
    plain = model(**inputs).loss
    names["regularize"](model, torch.distributed.group.WORLD)
    return (
        plain.item(),
        model(**inputs).loss.item(),
        model.train()(**inputs).loss.item(),
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "cohere"])
def test_a_validation_loss_stays_the_plain_one(name, pools, tmp_path):
    """Also of models that call their loss in a way of their own."""
    path = write_model(name, tmp_path)
    ((plain, validation, training),) = pools(1).run(losses_in_eval, path)
    assert validation == plain
    assert training != plain


def first_step(config) -> tuple[float, float]:
    """Loss and norm of the first step by torch's own functions, in one process."""
    model = AutoModelForCausalLM.from_pretrained(config.model_name)
    batch = next(iter(data.BatchLoader(config, Path(config.prepared_data), dp_rank=0)))
    total, valid = 0.0, float(data.valid_tokens(batch))
    for micro in batch:
        logits = model(micro["input_ids"]).logits[:, :-1].flatten(0, 1)
        labels = micro["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
        loss += 1e-4 * logits.logsumexp(-1)[labels != -100].square().sum()
        (loss / valid).backward()
        total += loss.item() / valid
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    return total, norm.item()


@pytest.mark.ranks
@pytest.mark.faults
def test_rows_from_ray_data_train_as_in_one_process(tmp_path, demo_paths):
    """On tp 2 x dp 2: the rows that each dp rank got, once each, and the weights."""
    path, texts = demo_paths[0], tmp_path / "my.jsonl"
    lines = [f"Document {n} has {n * n} words." for n in range(64)]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = make_config((path, str(texts)), tmp_path, 2, 2, max_steps=3)
    settings = {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.01}
    settings |= {"max_grad_norm": MAX_GRAD_NORM, "device": "cpu", "dtype": "float32"}
    config = replace(config, export_to=str(tmp_path / "out"), **settings)
    names = {}
    exec(f"{COMMON}\n{STREAM}", names)
    build, seen = names["fsdp"].build_engine, str(tmp_path)

    def build_and_record(config, mesh):
        engine = build(config, mesh)
        step, batches = engine.step, []
        file = f"{seen}/{mesh['dp'].get_local_rank()}{mesh['tp'].get_local_rank()}.pt"

        def record(batch):
            batches.append((batch[0]["input_ids"].clone(), batch[0]["labels"].clone()))
            torch.save(batches, file)
            return step(batch)

        engine.step = record
        return engine

    names["fsdp"] = SimpleNamespace(build_engine=build_and_record)
    try:
        launch.connect()
        names["run"](config)
    finally:
        ray.shutdown()
    ranks = ("00", "01", "10", "11")  # dp_rank, tp_rank
    first, again, second, twice = (torch.load(tmp_path / f"{r}.pt") for r in ranks)
    for one, other in zip([*first, *second], [*again, *twice], strict=True):
        assert all(map(torch.equal, one, other))
    steps = [[*pair] for pair in zip(first, second, strict=True)]
    rows = [tuple(row) for pair in steps for ids, _ in pair for row in ids.tolist()]
    assert len({*rows}) == len(rows) == 3 * config.global_batch_size
    *_, expected = train(path, "sgd", steps, MAX_GRAD_NORM)
    found = AutoModelForCausalLM.from_pretrained(config.export_to).state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5)


def test_recipes_are_short():
    for title, code in (RECIPES | {"Ray Data": STREAM}).items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 40, title
