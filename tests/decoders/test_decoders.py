"""Every decoder of transformers on both engines: equal to one process, or refused.

``make test-decoders`` runs it, prints the counts and writes docs/families.md.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.decoders import ranks, tiny
from tests.decoders.results import CELLS, Result

pytestmark = pytest.mark.decoders
# FSDP2's ranks serve both meshes; DeepSpeed keeps the first that a process had.
GROUPS = [[("fsdp", 1), ("fsdp", 2), ("lora", 2)], [("autotp", 1)], [("autotp", 2)]]


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    said = lines[-1] if lines else ""  # of a rank: with the class of its error
    return (said if ": " in said else f"{type(error).__name__}: {said}")[:300]


def observe(groups, name: str, folder, result: Result) -> None:
    """Fill in the result of one decoder."""

    def ask(function, *args):
        (answer,) = groups.run("one", 1, function, *args)
        return answer

    try:
        result.model = ask(ranks.prepare, name, folder)
    except Exception as error:
        result.unbuilt = last_line(error)
        return
    try:
        result.mask = ask(ranks.without_mask, folder)
    except Exception as error:
        result.mask = last_line(error)
    accepted = {}
    for engine, tp_size in CELLS:
        try:
            dp_size = 2 // tp_size
            found = ask(ranks.accept, engine, folder, tp_size, dp_size)
        except Exception as error:
            found = None, f"check: {last_line(error)}"
        accepted[engine, tp_size] = found

    def train(cell: tuple[str, int], group: str) -> str:
        config, said = accepted[cell]
        if config is None:
            is_sentence = not said.startswith(("not a sentence", "check: "))
            return f"refused: {said}" if is_sentence else f"wrong: {said}"
        try:
            answers = groups.run(group, 2, ranks.train, cell[0], config)
            named = (cell[0], folder, config, answers)
            differs = groups.run(f"{group} compared", 1, ranks.compare, *named)[0]
        except Exception as error:
            differs = f"fails in the workers: {last_line(error)}"
        if differs:
            return f"wrong: {differs}"
        return f"equal, `{said}`" if said else "equal"

    def train_all(cells: list) -> None:
        for cell in cells:
            result.cells[cell] = train(cell, str(cells))

    with ThreadPoolExecutor() as threads:
        list(threads.map(train_all, GROUPS))


@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_decoder_equals_one_process_or_is_refused(name, groups, found, tmp_path):
    if name not in tiny.decoders():
        pytest.skip("its text model has a name of its own")
    result = found[name] = Result()
    observe(groups, name, tmp_path, result)
    shutil.rmtree(tmp_path)
    assert not result.wrong()
