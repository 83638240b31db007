"""Small datasets, written as people keep them."""

import json
from pathlib import Path

SEQ = 16  # tokens in a row of the data tests


def write_lines(directory: Path, documents: list[dict], split: str = "train") -> str:
    directory.mkdir(exist_ok=True)
    lines = [json.dumps(document) + "\n" for document in documents]
    (directory / f"{split}.jsonl").write_text("".join(lines))
    return str(directory)


def write_texts(directory: Path, texts: list, split: str = "train") -> str:
    return write_lines(directory, [{"text": text} for text in texts], split)


def sentences(count: int) -> list[str]:
    return [f"Sentence {n} says that {n * n} is a square." for n in range(count)]
