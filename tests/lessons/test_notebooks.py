"""The notebooks run as they are, prove what they say, and render completely."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat import v4
from playwright.sync_api import sync_playwright
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts import make_site, run_notebooks, sync_notebooks
from tests.support import browser
from tests.support.demo import train_without_ray
from tp2d_lib.config import ConfigError
from tp2d_lib.flags import read_config
from tp2d_lib.lessons import notebook

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
FSDP = ROOT / "notebooks" / "fsdp2_dtensor.ipynb"
AUTOTP = ROOT / "notebooks" / "deepspeed_autotp.ipynb"
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


@each
def test_committed_clean_and_readable(path):
    sizes = []
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            lines = cell.source.splitlines()
            assert len(lines) <= 40, lines[0]
            assert max(map(len, lines)) <= 88
            sizes.append(len(lines))
    assert sum(sizes) <= 620
    assert sum(size > 15 for size in sizes) <= 8


@each
def test_mirrored_cells_equal_the_library(path, tmp_path):
    assert sync_notebooks.sync(path, check=True) == []
    edited = read(path)
    mirrored = [cell for cell in edited.cells if cell.metadata.get("tp2d_source")]
    assert len(mirrored) >= 2
    mirrored[0].source += " "  # one byte, and it is seen
    nbformat.write(edited, tmp_path / "edited.ipynb")
    (reference,) = sync_notebooks.sync(tmp_path / "edited.ipynb", check=True)
    assert reference == mirrored[0].metadata["tp2d_source"]


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """A notebook run by papermill with its own defaults, once; and its build folder."""

    @functools.cache
    def run(path):
        build = tmp_path_factory.mktemp("build")
        return read(run_notebooks.execute(path, build, {})), build

    return run


def printed(notebook) -> str:
    """Everything a notebook printed, in order."""
    return "\n".join(
        run_notebooks.plain(output)
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def number(pattern: str, text: str) -> float:
    """The one number that follows ``pattern`` in the text."""
    (found,) = re.findall(pattern + r"\s*([-+.\de]+)", text)
    return float(found)


@each
def test_every_cell_ran_without_noise(path, execute):
    for cell in execute(path)[0].cells:
        if cell.cell_type != "code":
            continue
        assert cell.execution_count, cell.source
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            plain = str(output.get("data", {}).get("text/plain"))
            assert "Warning" not in output.get("text", "") + plain


@each
def test_four_ranks_say_who_they_are(path, execute):
    text = printed(execute(path)[0])
    seen = re.findall(r"^(\d) +\d+ +(\d) +(\d) +\[", text, re.MULTILINE)
    assert seen == [("0", "0", "0"), ("1", "0", "1"), ("2", "1", "0"), ("3", "1", "1")]


@each
def test_fingerprints_follow_the_dp_rank(path, execute):
    rows = re.findall(r"\(2, 128\) +([0-9a-f]{8})", printed(execute(path)[0]))
    assert len(rows) == 4
    assert rows[0] == rows[1] != rows[2] == rows[3]


def test_one_file_to_copy_trains_as_the_engine(execute):
    text = printed(execute(FSDP)[0])
    assert number("differs from lesson 5 by", text) < 1e-5
    shared, of = re.search(
        r"(\d+) of (\d+) lines are", printed(execute(AUTOTP)[0])
    ).groups()
    assert int(shared) > int(of) / 2


@each
def test_the_model_learned(path, execute):
    text = printed(execute(path)[0])
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+) in", text).groups()
    assert float(last) < float(first) - 0.5
    if path == FSDP:
        held_out = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", text).groups()
        guess = number(r"ln\(2048\) =", text)
        assert float(held_out[1]) < float(held_out[0]) < guess


def test_resume_after_sigkill_is_exact(execute):
    text = printed(execute(FSDP)[0])
    assert "died" in text  # Ray saw the worker go
    assert number("of the two loss curves:", text) == 0
    same, of = re.search(r"(\d+) of (\d+) shard files", text).groups()
    assert same == of == "4"


def test_steps_after_a_restart_repeat_the_lost_ones(execute):
    """And in the end they are those of a run without an accident: below."""
    text = printed(execute(AUTOTP)[0])
    assert "died" in text
    assert "resumed after step 20" in text
    first, last = re.search(r"steps (\d+) to (\d+) were trained twice", text).groups()
    assert (first, last) == ("21", "24")
    assert number("largest difference of their losses:", text) == 0


def interrupted(path, execute) -> Path:
    """The folder of the run that lost a worker."""
    if path == AUTOTP:
        return kept_by(path, execute)
    (run,) = (execute(path)[1] / "runs").glob("*-accident")
    return run


@each
def test_tensorboard_has_one_clean_curve(path, execute):
    run = interrupted(path, execute)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, 41))
    attempts = list((run / "tensorboard").iterdir())
    assert len(attempts) == 2  # there were two writers


@each
def test_another_mesh_and_export(path, execute):
    moved = printed(execute(path)[0]).split("on dp 4 x tp 1")[1]
    assert number("relative difference of the losses:", moved) < 1e-5
    assert number("largest difference of the logits:", moved) < 1e-4


@each
def test_summary_repeats_the_figures(path, execute):
    text = run_notebooks.summary(execute(path)[1] / "notebooks" / path.name)
    for what in ("preset", "loss", "parity", "resume error", "tokens/s"):
        assert what in text


def test_a_dtensor_is_shown_before_it_is_used(execute):
    text = printed(execute(FSDP)[0])
    line = r"^(.+), (\w+\(.*\))\n  rank 0: (.+)\n  rank 1: (.+)$"
    held = {name: each for name, *each in re.findall(line, text, re.MULTILINE)}
    assert {name: placement for name, (placement, *_) in held.items()} == {
        "rows": "Shard(dim=0)",
        "copies": "Replicate()",
        "columns @ rows": "Partial(sum)",
        "sum": "Shard(dim=0)",
    }
    assert held["rows"][2] == "[[8, 9, 10, 11], [12, 13, 14, 15]]"


def test_every_plan_computes_the_same(execute):
    """Each one shards more than the one before, and communicates."""
    text = printed(execute(FSDP)[0]).replace(",", "")
    line = r"^(?:no plan|the MLPs|\+ \w+) +[\d.]+ +(\S+) +(\d+) +(\d+) +(\d+)$"
    rows = [list(map(float, row)) for row in re.findall(line, text, re.MULTILINE)]
    errors, weights, activations, sent = zip(*rows, strict=True)
    assert len(rows) == 5
    assert max(errors) < 1e-5
    assert list(weights) == sorted(weights, reverse=True)
    assert len(set(weights)) == 4  # the last plan shards activations only
    assert list(activations) == sorted(activations, reverse=True)
    assert sent[0] == 0 < min(sent[1:])


def test_bare_ray_train_leaves_a_checkpoint(execute):
    text = printed(execute(FSDP)[0])
    assert re.search(r"^\{'step': 3, 'loss': 7\.\d+\}$", text, re.MULTILINE)
    folders = sorted(execute(FSDP)[1].glob("runs/ray_train_run-*/checkpoint_2*"))
    assert len(folders) == 3
    files = {path.name for path in folders[-1].iterdir()}
    assert files >= {".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}


@each
def test_exercises_wait_for_an_answer(path, execute):
    assert printed(execute(path)[0]).count("no answer yet") == 3


def test_an_answer_is_checked(capsys):
    for given in (None, 2.333, 2.0):
        notebook.answer(given, 7 / 3)
    none, right, wrong = capsys.readouterr().out.splitlines()
    assert "no answer yet" in none
    assert right == "right"
    assert wrong.startswith("not 2.0: try again")


def test_the_mistake_is_measured(execute):
    text = printed(execute(FSDP)[0])
    assert number(r"dp_rank +\d\.\d+ +", text) < 1e-5
    assert number(r"world rank +\d\.\d+ +", text) > 0.1


def test_parity_with_one_process(execute):
    text = printed(execute(FSDP)[0])
    assert number("difference of the losses:", text.split("in bfloat16:")[0]) < 1e-5
    assert number("difference of any weight:", text) < 1e-3
    assert 1e-6 < number("in bfloat16:", text) < 1e-2


def test_adapters_train_as_in_one_process(execute):
    text = printed(execute(FSDP)[0]).split("both send the same at")[1]
    text = text.split("differs from lesson 5")[0]
    errors = re.findall(r"^\d +(0\.\d\d) +(\S+)$", text, re.MULTILINE)
    assert len(errors) == 4
    assert all(float(before) > 0.3 and float(after) < 1e-5 for before, after in errors)
    assert number("difference of the losses:", text) < 1e-5
    trained, every = re.search(r"trained: ([\d,]+) of ([\d,]+) weights", text).groups()
    assert int(trained.replace(",", "")) < int(every.replace(",", "")) / 20


def test_the_state_of_eight_billion_parameters_is_shared_out(execute):
    text = printed(execute(FSDP)[0])
    held = re.findall(r"^ *(\d+) GPUs: +([\d.]+) GB of state", text, re.MULTILINE)
    assert [(int(n), float(size)) for n, size in held] == [
        (1, 128.5),
        (8, 16.1),
        (64, 2.0),
    ]


def test_bytes_measured_beside_the_formulas(execute):
    text = printed(execute(FSDP)[0])
    ratios = re.findall(r"^(?:dp|tp) +[\d,]+ +[\d,]+ +([\d.]+)$", text, re.MULTILINE)
    assert ratios[0] == "1.00"  # gathered once, in one group
    assert 1.2 < float(ratios[1]) < 1.3  # embedding, head and loss besides the layers
    kinds = "all_gather|all_reduce|reduce_scatter"
    calls = re.findall(rf"^(?:dp|tp) +(?:{kinds}) +(\d+) +[\d,]+$", text, re.MULTILINE)
    assert calls == ["1", "2", "1", "10", "8", "10"]


def test_autotp_replaced_every_matrix(execute):
    text = printed(execute(AUTOTP)[0]).split("its own plan:")[0]
    assert len(re.findall(r"LinearLayer \(", text)) == 5
    assert len(re.findall(r"LinearAllreduce \(", text)) == 2
    assert "VocabParallelEmbedding (1024, 192)" in text
    assert "sharded by the model's tp_plan; vocabulary sharded" in text


def test_wrong_rows_are_seen_only_at_first(execute):
    text = printed(execute(AUTOTP)[0])
    assert "wrong rows in forward 1: Data inconsistency" in text
    assert "wrong rows in forward 2: accepted" in text
    right, wrong = re.search(r"loss ([\d.]+), read wrongly ([\d.]+)", text).groups()
    assert abs(float(right) - float(wrong)) > 1e-4


def test_a_fused_model_is_sharded_by_own_rules(execute):
    text = printed(execute(AUTOTP)[0])
    assert len(re.findall(r"try the shape \[\[192, 96, 96\], -1\]", text)) == 2
    assert number("in one process [\\d.]+: error", text) < 1e-5


def test_every_zero_stage_equals_one_process(execute):
    text = printed(execute(AUTOTP)[0])
    lines = re.findall(r"ZeRO \d x tp 2: AdamW (\S+), SGD (\S+)", text)
    assert len(lines) == 4
    assert all(float(error) < 1e-5 for errors in lines for error in errors)


def test_zero_bytes_fall_and_follow_the_formulas(execute):
    text = printed(execute(AUTOTP)[0]).replace(",", "")
    line = r"^tp (\d) x dp (\d) +(\d) +(\d+) +(\d+) +(\d+) +(\d+)"
    rows = [list(map(int, row)) for row in re.findall(line + "$", text, re.MULTILINE)]
    assert len(rows) == 8
    for mesh in (rows[:4], rows[4:]):
        sums = [row[-1] for row in mesh]
        assert sums == sorted(sums, reverse=True)
        assert len(set(sums)) == 4
    rows = re.findall(line + r" +(\d+)$", text, re.MULTILINE)
    assert len(rows) == 8
    for *_, dp, dp_said, tp, tp_said, _ in (map(int, row) for row in rows):
        assert dp == pytest.approx(dp_said, rel=1e-3)
        assert tp_said <= tp <= 1.2 * tp_said


def test_both_engines_train_the_same(execute):
    text = printed(execute(AUTOTP)[0]).split("on dp 4 x tp 1")[0]
    assert number("relative difference of the losses:", text) < 1e-5


def test_the_readme_says_what_was_proved(execute, tmp_path):
    """`make readme` wrote it: equal but for the speed, and errors of rounding."""
    committed = (ROOT / "README.md").read_text()
    readme = tmp_path / "README.md"
    readme.write_text(committed)
    (tmp_path / "images").mkdir()
    executed = [execute(path)[1] / "notebooks" / path.name for path in (FSDP, AUTOTP)]
    assert run_notebooks.write_readme(executed, readme)
    published = committed + (ROOT / "docs" / "performance.md").read_text()
    for image in (tmp_path / "images").iterdir():
        assert f"images/{image.name})" in published
        assert (ROOT / "images" / image.name).is_file()
    old, new = results_in(committed), results_in(readme.read_text())
    assert old.keys() == new.keys()
    version = "| Python {}.{} |".format(*sys.version_info)
    same_corpus = version in committed  # it is Python's own documentation
    assert len(new) >= 10
    for what, values in new.items():
        for was, value in zip(old[what], values, strict=True):
            if what in ("preset", "loss") or not value:
                assert was == value or (what == "loss" and not same_corpus)
            else:
                assert max(float(was), float(value)) < 1e-5, what


def results_in(readme: str) -> dict[str, list[str]]:
    """The README's table of results: the value of each notebook, by what was proved."""
    (table,) = re.findall(
        r"<!-- results -->\n(.*?)<!-- /results -->", readme, re.DOTALL
    )
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines()[2:]]
    return {what: values for what, *values in rows}


def test_make_demo_leaves_the_checkout_as_it_was():
    """Other processors round differently; only `make readme` writes their figures."""
    for target, writes in (("demo", False), ("readme", True)):
        lines = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        ).stdout
        assert "scripts/run_notebooks.py" in lines
        assert ("--write_readme" in lines) is writes


def test_the_readme_is_only_written_with_the_demos_figures(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results -->\nold\n<!-- /results -->\n")
    for preset, written in (("qwen2.5-0.5b", False), ("demo", True)):
        said = f"what      value\n--------  -----\npreset    {preset}\ntokens/s  7\n"
        printed = v4.new_output("stream", text=said)
        cell = v4.new_code_cell(outputs=[printed], metadata={"tags": ["summary"]})
        nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
        assert run_notebooks.write_readme([tmp_path / "x.ipynb"], readme) is written
        assert ("old" in readme.read_text()) is not written
    assert results_in(readme.read_text()) == {"preset": ["demo"]}


@pytest.fixture(scope="module")
def site(execute, tmp_path_factory):
    """The pages of both notebooks."""
    build = tmp_path_factory.mktemp("site")
    (build / "notebooks").mkdir()
    for path in NOTEBOOKS:
        executed = execute(path)[1] / "notebooks" / path.name
        shutil.copy(executed, build / "notebooks")
    make_site.write(build, "https://example.org/docs/")
    return build / "site"


@pytest.fixture(scope="module")
def chromium():
    if browser.CHROMIUM is None:
        pytest.skip("the pages were not opened, for want of Chromium")
    with sync_playwright() as playwright:
        started = browser.launch(playwright)
        yield started
        started.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
@pytest.mark.parametrize("name", make_site.ADDRESSES.values())
def test_a_page_in_a_browser(name, width, scheme, site, chromium):
    assert browser.problems(chromium, site / name, width, scheme) == []


def test_a_cell_is_copied(site, chromium):
    page = chromium.new_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto((site / "fsdp2_dtensor.html").as_uri())
    cell = page.locator(".code", has_text="ranks = Ranks(4)")
    cell.hover()
    cell.get_by_role("button", name="Copy").click()
    cell.get_by_text("Copied").wait_for()
    assert "ranks = Ranks(4)" in page.evaluate("navigator.clipboard.readText()")
    page.close()


def test_pages_tell_what_was_executed(site):
    for path in NOTEBOOKS:
        page = (site / f"{path.stem}.html").read_text()
        title = read(path).cells[0].source.splitlines()[0].removeprefix("# ")
        assert f"<title>{title}</title>" in page
        assert re.search(r"<footer>preset: demo .* PyTorch \S+.* executed \d{4}-", page)
        assert 'id="the-mesh-which-rank-goes-where"' in page
        for place in ("exercises", "glossary", "troubleshooting"):
            assert f'<li><a href="#{place}">' in page
        assert re.search(r"<summary>Imports \(\d+ lines\)</summary>", page)
        assert "<summary>Library source: " in page
        assert "# Parameters" not in page  # papermill's cell
        assert str(site.parent) not in page
    assert (
        '>Next: <a href="deepspeed_autotp.html">'
        in (site / "fsdp2_dtensor.html").read_text()
    )


def test_markdown_for_docs_sites(site):
    """Each notebook's plots are its own, with their alt texts."""
    folder, base = site / "markdown", "https://example.org/docs/"
    seen = []
    for path in NOTEBOOKS:
        text = (folder / f"{path.stem}.md").read_text()
        assert text.startswith('---\ntitle: "Train a language model')
        assert "<table>" not in text  # columns of text, as in a terminal
        assert "\n# Train" not in text  # sites show the title themselves
        assert "\x1b" not in text
        others = re.findall(r"(?<!!)\[[^\]]*\]\((\w+\.\w+)\)", text)
        assert set(others) == {f"{name}.md" for name in set(NAMES) - {path.stem}}
        images = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)
        plots = [link for _, link in images if path.stem in link]
        assert len(plots) >= 3
        assert all(len(alt) > 20 and alt != "png" for alt, _ in images)
        links = [link.removeprefix(base) for _, link in images]
        assert all((folder / link).is_file() for link in links)
        seen += plots
    assert len(seen) == len(set(seen))


@pytest.mark.ranks
def test_unknown_parameter_is_rejected(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="try TP_SIZE"):
        run_notebooks.execute(FSDP, tmp_path, {"TP_SIZ": 4})


def test_parameters_by_hand_are_not_checked():
    own = "PRESET = 'auto'\nTP_SIZE = 2"
    notebook.check_parameters([own, "x = 1"])  # a reader's own variable
    notebook.check_parameters([own, "# Parameters\nTP_SIZE = 4"])
    with pytest.raises(ConfigError, match="parameter DP_SIZ must be one of"):
        notebook.check_parameters([own, "# Parameters\nDP_SIZ = 4"])


@each
def test_history_is_in_the_last_checkpoint(path, execute):
    run = interrupted(path, execute)
    state = json.loads((run / "checkpoint-000040" / "trainer_state.json").read_text())
    assert [record["step"] for record in state["history"]] == list(range(1, 41))
    assert state["position"] == 40 * 8


def kept_by(path, execute):
    """The folder of a notebook's first run: with it lies the configuration."""
    runs = execute(path)[1] / "runs"
    (name,) = {p.parent.name for p in runs.glob("run-*/config.yaml")} - {
        p.parent.name for p in runs.glob("run-*-*-*/config.yaml")
    }
    return runs / name


def history(run) -> list[dict]:
    state = run / "checkpoint-000040" / "trainer_state.json"
    return json.loads(state.read_text())["history"]


def figures(run) -> list[tuple]:
    return [(record["loss"], record["grad_norm"]) for record in history(run)]


@pytest.mark.parametrize(("path", "engine"), [(FSDP, "fsdp"), (AUTOTP, "autotp")])
def test_a_loop_without_ray_gives_the_same_losses(
    path, engine, execute, pools, tmp_path
):
    """The configuration that the run kept, on forked ranks, of which none is lost; the
    command equals that loop too: tests/test_cli.py."""
    run = kept_by(path, execute)
    config = read_config({"config": str(run / "config.yaml")})
    trained = pools(4, engine).run(train_without_ray, engine, config, str(tmp_path))
    assert len(trained[0]) == 40
    assert trained == [figures(run)] * 4
