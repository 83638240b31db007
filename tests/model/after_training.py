"""The blocks of docs/after-training.md, by an export of a tiny model that chats.

``make test-exports`` makes the environment that the page asks for and runs this.
"""

import json
import math
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.chats import write_chat_model
from tests.support.demo import make_config
from tp2d_lib import data, fsdp
from tp2d_lib.run import evaluate

PAGE = Path(__file__).parents[2] / "docs" / "after-training.md"
BIN = Path("build/after-env/bin").absolute()
SPEAKS = "\nprint('SAID', answer[0]['generated_text'][-1]['content'])"


def blocks(title: str) -> list[tuple[str, str]]:
    """The kind and the content of each block below a title."""
    (part,) = re.findall(
        rf"^## {title}$(.*?)(?:^## |\Z)", PAGE.read_text(), re.M | re.S
    )
    return re.findall(r"^```(\w*)\n(.*?)^```$", part, re.M | re.S)


def export(config):
    """Run by every rank: a step, the loss of what is held out, and the export."""
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    engine = fsdp.build_engine(config, mesh)
    engine.step(next(iter(data.build_dataloader(config, mesh))))
    loss = evaluate.evaluate(engine, config)
    engine.export(config.export_to)
    return loss


def conversations(file: Path, name: str, count: int) -> str:
    with open(file, "w") as lines:
        for n in range(count):
            ask = {"role": "user", "content": f"What is {name} {n}?"}
            answer = {"role": "assistant", "content": f"It is {'very ' * (n % 5)}odd."}
            lines.write(json.dumps({"messages": [ask, answer]}) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def week(demo_paths, pools, tmp_path_factory):
    """A folder as the page has it, and the last validation loss of its model."""
    home = tmp_path_factory.mktemp("week")
    model = write_chat_model(demo_paths[0], home, "qwen")
    # The harness adds a newline before an answer to the answer, as the page says.
    template = Path(model, "chat_template.jinja")
    template.write_text(template.read_text().replace("assistant\n", "assistant:"))
    paths = (model, conversations(home / "train.jsonl", "number", 40))
    held_out = conversations(home / "held-out.jsonl", "letter", 11)
    settings = {"eval_every": 1, "eval_dataset": held_out, "eval_split": "train"}
    config = make_config(paths, home, 2, 1, pack="none", device="cpu", **settings)
    config = replace(config, dtype="float32", export_to=str(home / "my-model"))
    rows = {"prepared_data": str(data.prepare(config))}
    rows |= {"prepared_eval_data": str(evaluate.prepare(config))}
    config = replace(config, **rows)
    loss = pools(2).run(export, config)[0]
    adapter = replace(config, lora_rank=4, export_to=str(home / "my-adapter"))
    pools(2).run(export, adapter)
    (home / "tasks").mkdir()
    return home, config, loss


def run(home: Path, *command: str) -> str:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=home,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_talks(week):
    home, *_ = week
    (_, whole), (_, adapted) = blocks("Talk to it")
    asks = "".join(re.findall(r"^(?:question|answer) = .*\n", whole, re.M))
    for code in (whole, adapted + asks):
        said = run(home, "python", "-c", code + SPEAKS)
        assert re.search(r"SAID .", said)


def test_its_loss_is_that_of_the_run(week):
    home, config, loss = week
    (_, task), (_, command) = blocks("Evaluate it")
    (home / "tasks" / "held-out.yaml").write_text(task)
    said = run(home, *shlex.split(command.replace("\\\n", "")))
    perplexity = float(re.search(r"\|perplexity\|.*?\|\s*([\d.e+]+)\|", said)[1])
    about = data.describe(Path(config.prepared_eval_data))
    documents, tokens = re.match(r"(\d+) documents.*?([\d,]+) of them", about).groups()
    harness = math.log(perplexity) * int(documents) / int(tokens.replace(",", ""))
    assert harness == pytest.approx(loss, rel=1e-5)


def test_it_learns_preferences(week):
    home, config, _ = week
    ((_, code),) = blocks("Train it further")
    turns = [
        [{"role": role, "content": text}]
        for role, text in (("user", "Why?"), ("assistant", "So."), ("assistant", "No."))
    ]
    pair = dict(zip(("prompt", "chosen", "rejected"), turns, strict=True))
    (home / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 8)
    run(home, "python", "-c", code)
    assert (home / "my-model-dpo" / "model.safetensors").is_file()
    again = {"model_name": str(home / "my-model-dpo"), "export_to": None}
    fsdp.check(replace(config, **again))
