"""The page that an export writes about itself."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support.demo import make_config
from tp2d_lib import data
from tp2d_lib.run import card, evaluate

HISTORY = [
    {"step": 10, "loss": 7.5},
    {"step": 20, "loss": 7.0, "eval_loss": 7.1},
    {"step": 30, "loss": 6.5},
    {"step": 1040, "loss": 6.25, "eval_loss": 6.75},
]


@pytest.fixture(scope="module")
def config(demo_paths, tmp_path_factory):
    home = tmp_path_factory.mktemp("card")
    settings = {"eval_every": 20, "eval_fraction": 0.1, "text_column": None}
    config = make_config(demo_paths, home, 2, 2, device="cpu", **settings)
    config = replace(config, dtype="float32", export_to=str(home / "my-model"))
    rows = {"prepared_data": str(data.prepare(config))}
    rows |= {"prepared_eval_data": str(evaluate.prepare(config))}
    return replace(config, **rows)


def test_it_tells_what_was_trained_on_what_and_how(config):
    text = card.write("autotp", config, HISTORY)
    assert "# my-model\n" in text
    assert "with DeepSpeed AutoTP on tp 2 x dp 2" in text
    assert f"{Path(config.dataset_name).name}: " in text
    documents = data.describe(Path(config.prepared_data)).split(" documents")[0]
    assert f"{documents.split()[-1]} documents" in text
    assert "Held out: " in text
    assert [line for line in text.splitlines() if line.startswith("| 1")] == [
        "| 10 | 7.5000 |  |",
        "| 1,040 | 6.2500 | 6.7500 |",
    ]
    assert "| 30 |" not in text
    assert "| `learning_rate` | 0.01 |" in text
    assert "| `eval_fraction` | 0.1 |" in text
    assert "`num_epochs`" not in text  # at its default
    assert "deepspeed" in text


def test_no_path_of_this_machine_is_in_it(config):
    rules = Path(config.storage_path) / "rules.json"
    other = replace(config, partition_config=str(rules), text_column="a|b")
    text = card.write("autotp", other, HISTORY)
    assert config.storage_path not in text
    assert "| `partition_config` | rules.json |" in text
    assert r"| `text_column` | a\|b |" in text


def test_the_hub_reads_where_it_comes_from(config):
    about = ModelCard(card.write("fsdp", config, HISTORY)).data
    assert (about.base_model, about.datasets) == (None, None)
    assert (about.library_name, about.pipeline_tag) == (
        "transformers",
        "text-generation",
    )
    hub = {"model_name": "org/base", "dataset_name": "org/some,org/more"}
    other = replace(config, lora_rank=4, **hub)
    about = ModelCard(card.write("fsdp", other, HISTORY)).data
    assert (about.base_model, about.library_name) == ("org/base", "peft")
    assert about.datasets == ["org/some", "org/more"]
    merged = replace(other, merge_adapter=True)
    about = ModelCard(card.write("fsdp", merged, HISTORY)).data
    assert about.library_name == "transformers"


def export_twice(config, engine):
    """Run by every rank: a first export, and one after more steps."""
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    return [card.export(built, config, HISTORY[:n]) for n in (2, 4)]


@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_an_export_replaces_its_own_card_only(engine, config, pools, tmp_path):
    one = replace(config, tp_size=1, dp_size=1, num_workers=None)
    others = {
        "new": None,
        "kept": b"# Mine\n",
        "odd": b"---\n: {\n",
        "not": b"# \xe9\n",
    }
    for name, theirs in others.items():
        folder = tmp_path / name
        if theirs:
            folder.mkdir()
            (folder / "README.md").write_bytes(theirs)
        said = pools(1, engine).run(
            export_twice, replace(one, export_to=str(folder)), engine
        )[0]
        text = (folder / "README.md").read_bytes()
        assert (folder / "model.safetensors").is_file()
        if theirs:
            assert text == theirs
            assert said[1].endswith(
                "its README.md, which no export wrote, stays as it is"
            )
        else:
            assert b"| 1,040 | 6.2500 | 6.7500 |" in text
            assert said == [f"exported to {folder} in float32"] * 2
