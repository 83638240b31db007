"""The offline default: a tiny Qwen2 model, and a corpus that ships with Python."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2Tokenizer

VOCAB_SIZE = 2048


def write(directory: str | Path) -> tuple[str, str]:
    """Write the demo model and the demo dataset, unless they already exist.

    Both are in Hugging Face format, so that ``from_pretrained`` and
    ``load_dataset`` read them like any other: ``model/`` holds config, safetensors and
    tokenizer (about 1M random fp32 parameters), ``dataset/`` one JSON line for each
    paragraph of Python's own documentation: the language reference for training, the
    docstrings of a few modules for validation.

    Args:
        directory: folder that is visible to every node.

    Returns:
        The paths of the model and of the dataset.
    """
    directory = Path(directory)
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".demo-"))
        try:
            texts = paragraphs()
            write_dataset(work / "dataset", train=texts, validation=docstrings())
            write_model(work / "model", texts)
            os.chmod(work, 0o755)  # mkdtemp makes it private
            os.rename(work, directory)  # complete or not at all
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            if not directory.exists():  # else another process was faster: use its copy
                raise
    return str(directory / "model"), str(directory / "dataset")


def paragraphs() -> list[str]:
    """The paragraphs of Python's language reference, from the standard library."""
    from pydoc_data.topics import topics  # here: it is half a megabyte of text

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def docstrings() -> list[str]:
    """The docstrings of a few modules of the standard library."""
    names = ("argparse", "cmd", "decimal", "doctest", "heapq", "logging", "optparse")
    return [import_module(name).__doc__ or name for name in names]


def write_dataset(directory: Path, **splits: list[str]) -> None:
    directory.mkdir(parents=True)
    for split, texts in splits.items():
        with open(directory / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")


def write_model(directory: Path, texts: list[str]) -> None:
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, VOCAB_SIZE, show_progress=False
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,  # grouped queries, and tp_size up to 4
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
