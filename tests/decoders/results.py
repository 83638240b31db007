"""What was found out of every decoder: the counts, and docs/families.md."""

import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MARK = "<!-- decoders -->\n"
CELLS = {
    ("fsdp", 1): "FSDP2 tp 1",
    ("fsdp", 2): "FSDP2 tp 2",
    ("lora", 2): "FSDP2 tp 2, LoRA",
    ("autotp", 1): "AutoTP tp 1",
    ("autotp", 2): "AutoTP tp 2",
}
INTRODUCTION = """\
Every causal decoder of transformers {transformers}, made tiny (two layers, hidden size
64, a vocabulary of 509) and trained on two ranks of one machine with torch {torch} and
DeepSpeed {deepspeed}. *equal*: losses, gradient norms and every weight equal those of
one process, with the setting beside it where the default is refused. In the column
LoRA, adapters are trained beside all linear layers that tp shards. In that column and
in those of FSDP2 tp 2 and AutoTP tp 1, layers are recomputed in backward. Anything else
is refused in the driver, before a worker starts, with the sentence quoted. What is not
sharded is computed in full on every tp rank. `make test-decoders` writes this table.

"""


@dataclass
class Result:
    """Of one decoder; a cell begins with "equal", "refused" or "wrong"."""

    model: str = ""  # its class
    unbuilt: str = ""  # why it could not be made tiny
    mask: str = ""  # "taken": attention needs none
    cells: dict[tuple[str, int], str] = field(default_factory=dict)

    def wrong(self) -> list[str]:
        said = [f"{CELLS[k]}: {v}" for k, v in self.cells.items() if v[:5] == "wrong"]
        return said + [self.mask] * (self.mask not in ("", "taken"))


def counts(results: dict[str, Result]) -> list[str]:
    """The table of counts, line by line."""
    built = {name: result for name, result in results.items() if not result.unbuilt}
    lines = [f"decoders {len(results)}, built tiny {len(built)}"]
    for name, result in results.items():
        if result.unbuilt:
            lines.append(f"  not built: {name}: {result.unbuilt}")
    taken = sum(result.mask == "taken" for result in built.values())
    lines.append(f"attend without a mask {taken}")
    for cell, title in CELLS.items():
        said = [result.cells[cell] for result in built.values() if cell in result.cells]
        kinds = Counter(re.split(r"\W", one)[0] for one in said)
        lines.append(
            f"{title}: equal {kinds['equal']}, refused {kinds['refused']}, "
            f"wrong {kinds['wrong']}"
        )
        reasons = Counter(rule(one) for one in said if one.startswith("refused"))
        lines += [f"  {n:3} refused: {why}" for why, n in reasons.most_common()]
    for name, result in built.items():
        lines += [f"  WRONG {name}, {said}" for said in result.wrong()]
    return lines


def rule(sentence: str) -> str:
    """The rule of a refusal, without the names and numbers in it."""
    found = re.search(r"(?:must|works) (.*?)[,;(]", sentence)
    said = found[1] if found else sentence
    return re.sub(r"'[^']*'|\b\w*[A-Z]\w+[A-Z]\w*\b|\d+", "..", said)


def write_page(results: dict[str, Result]) -> None:
    used = ("transformers", "torch", "deepspeed")
    versions = {name: version(name).partition("+")[0] for name in used}
    lines = [["family", "model", *CELLS.values()], ["---"] * (2 + len(CELLS))]
    for name, result in results.items():
        cells = [result.cells.get(cell, "") for cell in CELLS]
        if result.unbuilt:
            cells[0] = f"not tried: {result.unbuilt}"
        lines.append([name, result.model, *cells])
    equal = [
        sum(
            result.cells.get(cell, "").startswith("equal")
            for result in results.values()
        )
        for cell in CELLS
    ]
    lines.insert(2, [f"{len(results)} families, *equal*:", "", *map(str, equal)])
    table = "".join(f"| {' | '.join(clean(c) for c in line)} |\n" for line in lines)
    kept = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(kept + MARK + INTRODUCTION.format(**versions) + table)


def clean(cell: str) -> str:
    return " ".join(cell.replace("|", "/").split())
