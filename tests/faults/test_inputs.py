"""Whatever is given ends in a good run to start, or in one sentence; never otherwise.

``HYPOTHESIS_PROFILE=full`` tries more than a thousand cases.
"""

import contextlib
import io
import os
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.faults import wild
from tests.faults.conftest import SURVIVED, TRIED
from tests.support.texts import sentences, write_texts
from tp2d_lib import cli, data, fsdp, presets
from tp2d_lib.autotp import rules
from tp2d_lib.checkpoint import CheckpointError
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.flags import FLAGS
from tp2d_lib.lessons import notebook
from tp2d_lib.model import PlanError
from tp2d_lib.run import launch

SENTENCES = (CheckpointError, ConfigError, PlanError)
SECONDS = 20  # allowed for one case

BASE = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", **BASE, derandomize=True)
settings.register_profile("full", **BASE, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
settings.load_profile(PROFILE)


def cases(quick: int, full: int):
    return settings(max_examples=full if PROFILE == "full" else quick)


@contextlib.contextmanager
def case(kind: str):
    """A case that must return or raise a sentence, within the time allowed."""

    def expire(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    TRIED[kind] += 1
    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        yield
    except SENTENCES as error:
        said = str(error).splitlines()
        if len(said) != 1:
            raise AssertionError(f"{len(said)} lines") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    SURVIVED[kind] += 1


@pytest.fixture(scope="module")
def home(tmp_path_factory, demo_paths):
    """A directory of its own to work in; Ray and training are out of reach."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "file").touch()
    (folder / "old" / "checkpoint-000002").mkdir(parents=True)
    write_texts(folder / "texts", sentences(20))
    (folder / "demo").symlink_to(Path(demo_paths[0]).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setattr(launch, "pick_device", lambda config: "cpu")
        patch.setattr(cli, "train", lambda *_: 0)
        yield folder


@given(values=wild.settings_of(most=5))
@cases(35, 400)
def test_values_of_fields(values):
    with case("TrainConfig"):
        config = TrainConfig(**values)
        rules.read(config.partition_config)
        assert replace(config) == config
        assert TrainConfig(**yaml.safe_load(launch.as_yaml(config))) == config


def command(engine: str, argv: list[str]) -> None:
    """The command ends with 0, or with 2 and a single line."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(engine, "", argv)
        except SystemExit as stop:  # argparse
            code = stop.code
    lines = err.getvalue().splitlines()
    assert (code, len(lines)) in ((0, 0), (2, 1)), err.getvalue()
    assert all(line.startswith("error: ") for line in lines)


FLAGS = {f.name: f"--{FLAGS.get(f.name, f.name)}" for f in fields(TrainConfig)}
ENGINES = st.sampled_from(["fsdp", "autotp"])


@given(engine=ENGINES, argv=wild.flags_of(FLAGS | {"resume_from": "--resume_from"}))
@cases(8, 200)
def test_flags(home, engine, argv):
    with case("flags"):
        command(engine, ["--offline_demo", "--storage_path", ".", "--tp_size=1", *argv])


documents = st.one_of(
    wild.settings_of().map(lambda v: yaml.dump(v)),
    st.text(max_size=40),
    st.sampled_from(["[" * 5000, "a: *b", "&a [*a]", "1: 2", "? [1]\n: 2", "---\n---"]),
)


@example(engine="fsdp", text="[" * 5000, other="", use="c")
@given(engine=ENGINES, text=documents, other=wild.texts, use=st.sampled_from("crcro"))
@cases(10, 200)
def test_files_of_values(home, engine, text, other, use):
    """Of --config, or those that a run to be resumed was started with."""
    Path("old/config.yaml").write_text(text, "utf-8", "surrogateescape")
    given = {"c": "--config=old/config.yaml", "r": "--resume_from=old"}
    with case("YAML"):
        argv = ["--offline_demo", "--storage_path=.", "--tp_size=1"]
        command(engine, [*argv, given.get(use, f"--config={other}")])


@given(
    cells=st.lists(st.text(max_size=20) | st.just("PRESET = 'auto'\nTP = 2")),
    names=st.lists(wild.texts, max_size=2),
    preset=wild.wild | st.sampled_from([*presets.PRESETS, "auto"]),
    values=wild.settings_of([name for name in wild.NAMES if name != "storage_path"]),
)
@cases(10, 150)
def test_parameters_of_notebooks(home, cells, names, preset, values):
    injected = "\n".join([notebook.INJECTED, *(f"{name} = 1" for name in names)])
    with case("notebook"):
        notebook.check_parameters([*cells, injected])
        presets.choose(preset, 0, 4)
    with case("notebook"):
        presets.build_config("demo", ".", **values)


def write_documents(folder: Path, documents: list[dict], kind: str) -> None:
    folder.mkdir()
    if kind == "parquet":
        with contextlib.suppress(
            pa.ArrowException, OverflowError, TypeError, ValueError
        ):
            parquet.write_table(pa.Table.from_pylist(documents), folder / "a.parquet")
    else:
        lines = [wild.as_json(d) for d in documents if wild.is_json(d)]
        (folder / "train.jsonl").write_bytes(b"\n".join(lines))


@given(
    documents=wild.documents,
    kind=st.sampled_from(["parquet", "jsonl"]),
    column=st.sampled_from([None, "text", "id", "", "ünï"]),
    pack=st.sampled_from(["auto", "documents", "stream", "none"]),
)
@cases(10, 150)
def test_rows_of_datasets(
    home, demo_paths, tmp_path_factory, documents, kind, column, pack
):
    folder = tmp_path_factory.mktemp("dataset") / "texts"
    write_documents(folder, documents, kind)
    given = {"text_column": column, "pack": pack, "seq_length": 8, "cache_dir": "rows"}
    with case("dataset"):
        data.prepare(TrainConfig(demo_paths[0], dataset_name=str(folder), **given))


MODEL = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
MODEL += ["tokenizer_config.json"]


@given(name=st.sampled_from(MODEL), draw=st.data())
@cases(10, 200)
def test_model_folders(home, demo_paths, tmp_path_factory, name, draw):
    model = tmp_path_factory.mktemp("model")
    for file in Path(demo_paths[0]).iterdir():
        (model / file.name).symlink_to(file)
    content = (model / name).read_bytes()
    (model / name).unlink()
    (model / name).write_bytes(draw.draw(wild.damages(content)))
    given = {"seq_length": 8, "storage_path": str(home), "device": "cpu"}
    with case("model"):
        config = TrainConfig(str(model), dataset_name=str(home / "texts"), **given)
        launch.prepare(fsdp.check(config))


@pytest.fixture(scope="module")
def rows(home, demo_paths):
    """Rows as they are prepared, and their configuration."""
    given = {"seq_length": 8, "storage_path": str(home), "device": "cpu"}
    config = TrainConfig(demo_paths[0], dataset_name=str(home / "texts"), **given)
    return data.prepare(config), config


@given(
    name=st.sampled_from(["rows.json", "input_ids.npy", "lengths.npy"]), draw=st.data()
)
@cases(10, 150)
def test_folders_of_rows(rows, tmp_path_factory, name, draw):
    folder, (good, config) = tmp_path_factory.mktemp("rows"), rows
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_bytes(draw.draw(wild.damages((good / name).read_bytes())))
    if draw.draw(st.booleans()):
        (folder / "rows.json").unlink()
    with case("rows"):
        config = launch.prepare(replace(config, prepared_data=str(folder)))
        ids = np.load(folder / "input_ids.npy")
        assert ids.min() >= 0
        assert ids.max() < 2048
