"""The notebooks run as they are, prove what they say, and render completely."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import papermill
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts import run_notebooks, sync_notebooks
from tp2d_lib import notebook
from tp2d_lib.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FSDP = ROOT / "notebooks" / "fsdp2_dtensor.ipynb"


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_clean_and_readable(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            lines = cell.source.splitlines()
            assert len(lines) <= 40, lines[0]
            assert max(map(len, lines)) <= 88


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_mirrored_cells_equal_the_library(path, tmp_path):
    assert sync_notebooks.sync(path, check=True) == []
    edited = read(path)
    mirrored = [cell for cell in edited.cells if cell.metadata.get("tp2d_source")]
    assert len(mirrored) >= 5
    mirrored[0].source += " "  # one byte, and it is seen
    nbformat.write(edited, tmp_path / "edited.ipynb")
    (reference,) = sync_notebooks.sync(tmp_path / "edited.ipynb", check=True)
    assert reference == mirrored[0].metadata["tp2d_source"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, run by papermill with its own defaults; and its build folder."""
    build = tmp_path_factory.mktemp("build")
    return read(run_notebooks.execute(FSDP, build, {})), build


@pytest.fixture(scope="module")
def printed(executed):
    """Everything the notebook printed, in order."""
    outputs = [
        output
        for cell in executed[0].cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    return "\n".join(output.get("text", "") for output in outputs)


def number(pattern: str, text: str) -> float:
    """The one number that follows ``pattern`` in the text."""
    (found,) = re.findall(pattern + r"\s*([-+.\de]+)", text)
    return float(found)


def test_every_cell_ran_without_noise(executed):
    for cell in executed[0].cells:
        if cell.cell_type != "code":
            continue
        assert cell.execution_count, cell.source
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            plain = str(output.get("data", {}).get("text/plain"))
            assert "Warning" not in output.get("text", "") + plain


def test_four_ranks_say_who_they_are(printed):
    seen = re.findall(r"^(\d) +\d+ +(\d) +(\d) +\[", printed, re.MULTILINE)
    assert seen == [("0", "0", "0"), ("1", "0", "1"), ("2", "1", "0"), ("3", "1", "1")]


def test_fingerprints_follow_the_dp_rank(printed):
    rows = re.findall(r"\(2, 128\) +([0-9a-f]{8})", printed)
    assert len(rows) == 4
    assert rows[0] == rows[1] != rows[2] == rows[3]


def test_the_mistake_is_measured(printed):
    assert number(r"dp_rank +\d\.\d+ +", printed) < 1e-5
    assert number(r"world rank +\d\.\d+ +", printed) > 0.1


def test_parity_with_one_process(printed):
    assert number("difference of the losses:", printed.split("another")[0]) < 1e-5
    assert number("difference of any weight:", printed) < 1e-3


def test_bytes_measured_beside_the_formulas(printed):
    ratios = re.findall(r"^(?:dp|tp) +[\d,]+ +[\d,]+ +([\d.]+)$", printed, re.MULTILINE)
    assert len(ratios) == 2
    assert all(0.5 < float(ratio) < 1.5 for ratio in ratios)


def test_the_model_learned(printed):
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+) in", printed).groups()
    assert float(last) < float(first) - 0.5


def test_resume_after_sigkill_is_exact(executed, printed):
    assert "died" in printed  # Ray saw the worker go
    assert number("of the two loss curves:", printed) == 0
    same, files = re.search(r"(\d+) of (\d+) shard files", printed).groups()
    assert same == files == "4"


def test_tensorboard_has_one_clean_curve(executed):
    (run,) = (executed[1] / "runs").glob("*-accident")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, 41))
    attempts = list((run / "tensorboard").iterdir())
    assert len(attempts) == 2  # there were two writers


def test_another_mesh_and_export(printed):
    assert number("relative difference of the losses:", printed.split("dp 4")[1]) < 1e-5
    assert number("largest difference of the logits:", printed) < 1e-4


def test_summary_repeats_the_figures(executed):
    text = run_notebooks.summary(executed[1] / "notebooks" / FSDP.name)
    for what in ("preset", "loss", "parity", "resume error", "tokens/s"):
        assert what in text


class Images(HTMLParser):
    """Sources and alt texts of a page's images, and addresses of its scripts."""

    def __init__(self):
        super().__init__()
        self.images, self.scripts = [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append((attrs["src"], attrs.get("alt", "")))
        if tag in ("script", "link") and (attrs.get("src") or attrs.get("href")):
            self.scripts.append(attrs.get("src") or attrs.get("href"))


def test_renders_with_every_image_in_place(executed):
    html, markdown = run_notebooks.render(
        executed[1] / "notebooks" / FSDP.name, executed[1]
    )
    page = Images()
    page.feed(html.read_text())
    files = [src for src, _ in page.images if not src.startswith("data:")]
    assert len(files) == 4  # the four figures
    assert len(page.images) >= 7  # and the plots
    assert all((html.parent / src).is_file() for src in files)
    assert all(len(alt) > 20 for src, alt in page.images if src in files)
    assert page.scripts == []  # complete without a network
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown.read_text())
    assert len(links) >= 7
    assert all((markdown.parent / link).is_file() for link in links)


def test_unknown_parameter_is_rejected(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="try TP_SIZE"):
        run_notebooks.execute(FSDP, tmp_path, {"TP_SIZ": 4})


def test_parameters_by_hand_are_not_checked():
    own = "PRESET = 'auto'\nTP_SIZE = 2"
    notebook.check_parameters([own, "x = 1"])  # a reader's own variable
    notebook.check_parameters([own, "# Parameters\nTP_SIZE = 4"])
    with pytest.raises(ConfigError, match="parameter DP_SIZ must be one of"):
        notebook.check_parameters([own, "# Parameters\nDP_SIZ = 4"])


def test_history_is_in_the_last_checkpoint(executed):
    (run,) = (executed[1] / "runs").glob("*-accident")
    state = json.loads((run / "checkpoint-000040" / "trainer_state.json").read_text())
    assert [record["step"] for record in state["history"]] == list(range(1, 41))
    assert state["position"] == 40 * 8
