"""The page "Which mesh?": sliders that choose among the planner's answers."""

from __future__ import annotations

import json
from pathlib import Path

from nbformat import NotebookNode, v4

from tp2d_lib.cost import dryrun

HERE = Path(__file__).parent
NAMES = {
    "models": "Model",
    "gpus": "GPU",
    "ranks": "Number of GPUs",
    "lengths": "Tokens in a row",
}
START = {"models": "7b", "gpus": "H100", "ranks": 16, "lengths": 2048}
TITLES = ("mesh", "memory of a GPU", "sent over tp", "sent over dp", "speed of a GPU")


def book() -> NotebookNode:
    """The page as a notebook: the sliders, their table and all of its rows."""
    known = json.loads((HERE / "meshes.json").read_text())
    shown = {name: [label(name, each) for each in known[name]] for name in NAMES}
    tables = {
        f"{key}/{gpu}": table(key, rows, number, memory)
        for key, rows in known["rows"].items()
        for number, (gpu, memory) in enumerate(known["gpus"].items())
    }
    start = "/".join(
        str(START[name]) for name in ("models", "lengths", "ranks", "gpus")
    )
    choices = {name: [str(each) for each in known[name]] for name in NAMES}
    data = {"choices": choices, "shown": shown, "tables": tables}
    sliders = "\n".join(
        f'<div><label for="{name}">{NAMES[name]}</label> '
        f'<output for="{name}">{shown[name][at]}</output>'
        f'<input type="range" id="{name}" name="{name}" min="0" '
        f'max="{len(shown[name]) - 1}" value="{at}"></div>'
        for name in NAMES
        for at in [choices[name].index(str(START[name]))]
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in TITLES)
    widget = f"""<form class="mesh" hidden>
{sliders}
</form>
<div class="wide" tabindex="0" role="region" aria-label="Meshes"><table class="meshes">
<thead><tr>{head}</tr></thead>
<tbody aria-live="polite">{tables[start]}</tbody>
</table></div>
<script type="application/json" id="meshes">{json.dumps(data)}</script>"""
    text = (HERE / "mesh.md").read_text("utf-8").replace("<!-- meshes -->", widget)
    return v4.new_notebook(cells=[v4.new_markdown_cell(text)])


def label(name: str, value) -> str:
    if name == "models":
        return f"Qwen2.5, {value.upper()}"
    return f"{value:,}" if isinstance(value, int) else value


def table(key: str, rows: list[list], gpu: int, memory: float) -> str:
    """The body of the table for one choice; the page itself computes nothing."""
    _, length, ranks = key.split("/")
    speeds = [int(length) / (tp_size * seconds[gpu]) for tp_size, *_, seconds in rows]
    fits = [peak <= memory for _, peak, *_ in rows]
    best = max((speed for speed, ok in zip(speeds, fits, strict=True) if ok), default=0)
    most = max(max(tp, dp) for _, _, tp, dp, _ in rows) or 1
    lines = []
    for (tp_size, peak, tp, dp, _), speed, ok in zip(rows, speeds, fits, strict=True):
        told = f"{speed:,.0f} tokens/s" + ", fastest" * (speed == best)
        cells = [
            cell(dryrun.size(peak) + ", too much" * (not ok), peak / memory, ok),
            cell(dryrun.size(tp), tp / most),
            cell(dryrun.size(dp), dp / most),
            cell(told, speed / best) if ok else cell("does not fit", 0),
        ]
        mesh = f'<th scope="row">tp {tp_size} x dp {int(ranks) // tp_size}</th>'
        lines.append(f"<tr>{mesh}{''.join(cells)}</tr>")
    return "".join(lines)


def cell(text: str, share: float, fits: bool = True) -> str:
    """Text over a bar that fills a share of the cell's width."""
    kind = "bar" if fits else "bar over"
    bar = f'<span class="{kind}" style="width:{100 * min(share, 1):.0f}%"></span>'
    return f"<td>{text}{bar}</td>"
