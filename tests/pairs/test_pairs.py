"""Every pair of settings: as one process trains, and resumed bit by bit, or refused.

Mechanisms meet in pairs. Rows of settings that cover all pairs of values are checked as
by a command, trained on real ranks, compared with one process, and resumed from their
own checkpoint. ``make test`` runs those that cover most, but for compiling, which takes
minutes; ``make test-pairs`` runs all.
"""

from __future__ import annotations

import io
import re
import shutil
from collections import Counter
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.pairs import settings, training
from tests.support.chats import write_chat_model
from tests.support.models import write_model
from tests.support.parity import assert_weights_equal
from tests.support.pool import Pool
from tests.support.texts import sentences, write_lines, write_texts
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model import PlanError
from tp2d_lib.run import launch

FEW = 12  # rows of each engine in make test
PATIENCE_S = 900  # compiling takes minutes where many processes run
VOCAB_SIZE = 2053  # prime, and enough for the tokenizer
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}  # beyond the vocabulary
MODELS = {
    "llama": ("llama", {}),  # no biases
    "qwen2": ("qwen2-tied", {}),  # some
    "starcoder2": ("starcoder2", NO_ENDS),  # everywhere
    "windows": ("mistral", {"sliding_window": settings.SEQ // 3}),  # needs masks
}
SENTENCE = re.compile(r".+ (must|works|cannot) .+; try .+", re.DOTALL)
EXACT = (1e-5, 1e-4)  # relative, of losses and norms
HALF = (2e-3, 2e-2)  # in bfloat16, before the first update
LATER = (2e-1, 2e-1)  # and after it: AdamW follows the sign of what rounding leaves


class Net:
    """The models and the data of all cases, and what came of each."""

    def __init__(self, demo_model: str, folder: Path):
        self.folder, self.found = folder, []
        self.tokenizer = write_chat_model(demo_model, folder, "gemma", marked=True)
        self.pool, self.key = None, None
        launch.quiet()
        self.data = {
            "text": write_texts(folder / "text", sentences(200)),
            "chats": write_lines(folder / "chats", chats(60)),
        }
        write_texts(folder / "text", sentences(20), split="validation")
        write_lines(folder / "chats", chats(9), split="validation")

    def model(self, name: str, tied: bool) -> str:
        folder = self.folder / f"{name}-{tied}"
        if not folder.exists():
            kind, more = MODELS[name]
            sizes = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.1}
            written = write_model(
                kind, self.folder, tie_word_embeddings=tied, **sizes, **more
            )
            shutil.move(written, folder)
            AutoTokenizer.from_pretrained(self.tokenizer).save_pretrained(folder)
        return str(folder)

    def config(self, case: dict) -> TrainConfig:
        held_out = self.data.get(case["held_out"])
        return TrainConfig(
            model_name=self.model(case["model"], case["tied"]),
            dataset_name=self.data[case["data"]],
            eval_dataset=held_out if held_out != self.data[case["data"]] else None,
            storage_path=str(self.folder / "runs"),
            **settings.settings_of(case),
        )

    def prepare(self, engine: str, case: dict) -> TrainConfig | str:
        """What a command would train with, or the sentence that refuses it."""
        check = import_module(f"tp2d_lib.{engine}").check
        try:
            with redirect_stdout(io.StringIO()):
                return launch.prepare(check(self.config(case)))
        except (ConfigError, PlanError) as error:
            return str(error)

    def run(self, engine: str, case: dict) -> str:
        """What came of a case: "right", "refused", or else what is wrong."""
        config = self.prepare(engine, case)
        if isinstance(config, str):
            return "refused" if SENTENCE.fullmatch(config) else f"said: {config}"
        folder = self.folder / f"{engine}-{len(self.found)}"
        try:
            answers = self.ranks(engine, config).run(
                training.run,
                engine,
                config,
                case,
                str(folder),
                seconds=PATIENCE_S,
            )
            compare(answers, config, case, folder)
        except Exception as error:
            self.close()
            text = str(error).strip().splitlines()
            return f"{type(error).__name__}: {' | '.join(text[-3:] or [''])}"[:600]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return "right"

    def ranks(self, engine: str, config: TrainConfig) -> Pool:
        """DeepSpeed keeps its first mesh, and for good what ZeRO 3 has exchanged."""
        key = (engine, config.num_workers)
        if engine == "autotp":
            key += (config.tp_size, config.zero_stage == 3)
        if key != self.key:
            self.close()
            self.pool, self.key = Pool(config.num_workers), key
        return self.pool

    def close(self) -> None:
        if self.pool:
            self.pool.close()
        self.pool = self.key = None


def chats(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}. " * (1 + n % 3)},
            ]
        }
        for n in range(count)
    ]


def compare(answers: list, config: TrainConfig, case: dict, folder: Path) -> None:
    losses, norms, weights, held_out = training.expected(config, case["frozen"])
    first, later = EXACT, EXACT
    if case["precision"] != "float32":
        first, later = HALF, LATER
    for found in answers:
        steps = zip(found["steps"], losses, norms, strict=True)
        for rtol, (got, *expected) in zip((first, later, later), steps, strict=True):
            assert got[0] == pytest.approx(expected[0], rel=rtol[0])
            assert got[1] == pytest.approx(expected[1], rel=rtol[1])
        if held_out:
            assert found["held_out"] == pytest.approx(held_out, rel=later[0])
        assert not found["resumed"], f"differs when resumed: {found['resumed'][:3]}"
    if case["precision"] == "float32":
        # Of a large vocabulary most tokens have next to no gradient.
        exported = training.exported(str(folder / "export"))
        assert_weights_equal(exported, weights, least=0.5)


@pytest.fixture(scope="module")
def net(demo_paths, tmp_path_factory):
    net = Net(demo_paths[0], tmp_path_factory.mktemp("pairs"))
    yield net
    net.close()


def meet(net: Net, engine: str, rows: list[dict]) -> tuple[set, list]:
    """Run cases by their groups of ranks; returns the pairs they cover, and wrongs."""
    covered, wrong, counts = set(), [], Counter()
    order = lambda case: (case["mesh"], case.get("zero_stage") == 3)  # noqa: E731
    for case in sorted(rows, key=order):
        outcome = net.run(engine, case)
        net.found.append(case)
        counts[outcome if outcome in ("right", "refused") else "wrong"] += 1
        if outcome != "refused":
            covered |= settings.pairs_of(case)
        if outcome not in ("right", "refused"):
            unusual = case.items() - settings.usual(engine).items()
            wrong.append(f"{sorted(unusual, key=str)}: {outcome}")
            print(f"{engine}: wrong: {wrong[-1]}", flush=True)
    print(f"{engine}: {len(rows)} cases, {len(covered)} pairs covered, {dict(counts)}")
    return covered, wrong


@pytest.mark.ranks
@pytest.mark.parametrize("engine", settings.OWN)
def test_the_rows_that_cover_most(net, engine):
    rows = [row | {"compile": False} for row in settings.rows_of(engine)[:FEW]]
    _, wrong = meet(net, engine, rows)
    assert not wrong, "\n".join(wrong)


@pytest.mark.faults
@pytest.mark.parametrize("engine", settings.OWN)
def test_every_pair(net, engine):
    """What the rows leave out meets alone: most of it, because it is refused."""
    covered, wrong = meet(net, engine, settings.rows_of(engine))
    left = settings.all_pairs(engine) - covered
    alone = [settings.usual(engine) | dict(pair) for pair in left]
    more, wrong_too = meet(net, engine, alone)
    pairs, together = settings.all_pairs(engine), covered | more
    print(
        f"{engine}: {len(pairs & together)} of {len(pairs)} pairs meet, others refused"
    )
    assert not wrong + wrong_too, "\n".join(wrong + wrong_too)
