"""Exports as transformers 4.57 and PEFT read them, in an environment of its own.

``make test-exports`` makes the environment and runs this; ``make test`` does not.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.model.test_exports import ENGINES, export, write_older
from tests.support.demo import make_config
from tests.support.models import write_model
from tests.support.parity import MAX_GRAD_NORM, make_steps, share_of
from tests.support.parity import make_config as make_parity_config

ELSEWHERE = "build/exports-env/bin/python"
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

read = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    ids = torch.arange(2, 66)[None]
    try:
        tokens = AutoTokenizer.from_pretrained(folder)("Lists may be nested.").input_ids
    except ValueError as error:  # of a class that this release does not have
        tokens = str(error)
    with torch.no_grad():
        read[folder] = model(ids).logits[0, -1].tolist(), tokens
print(json.dumps(read))
"""


def read(python, folders):
    """Logits of a last position, and token ids, by folder."""
    command = [python, "-c", READ, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]).values())


def write_newer(folder):
    return Path(write_model("qwen2-tied", folder, initializer_range=0.2))


@pytest.mark.parametrize("write", [write_older, write_newer])
def test_exports_are_read_as_their_source(write, demo_paths, tmp_path, pools):
    """In the older form, by both releases alike."""
    source = write(tmp_path)
    older = write is write_older
    for file in Path(demo_paths[0]).glob("tokenizer*"):
        content = file.read_text()
        if older:
            content = content.replace("TokenizersBackend", "PreTrainedTokenizerFast")
        (source / file.name).write_text(content)
    folders = [source]
    for engine in ENGINES:
        target = tmp_path / engine
        paths, settings = (str(source), demo_paths[1]), {"export_to": str(target)}
        config = make_config(paths, tmp_path, 2, 1, device="cpu", **settings)
        said = pools(2, engine).run(export, engine, config)
        assert said[0] == f"exported to {target} in float32"
        folders.append(target)
    here, elsewhere = read(sys.executable, folders), read(ELSEWHERE, folders)
    for logits, tokens in (*here, *(elsewhere if older else [])):
        assert logits == pytest.approx(here[0][0], abs=1e-4)
        assert tokens == here[0][1]
    for logits, tokens in elsewhere:
        assert logits == pytest.approx(elsewhere[0][0], abs=1e-4)
        assert tokens == elsewhere[0][1]


ADAPT = """
import json, sys, torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, start, end, merged, steps, kind, clip, out = sys.argv[1:]
load = AutoModelForCausalLM.from_pretrained  # float32, as the files are
model = PeftModel.from_pretrained(load(base), start, is_trainable=True)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = {
    "sgd": lambda: torch.optim.SGD(trained, lr=0.5, weight_decay=0.01),
    "adamw": lambda: torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01),
}[kind]()
figures = []
for micro_batches in torch.load(steps):
    valid, total = sum((t[:, 1:] != -100).sum() for _, t in micro_batches), 0.0
    for ids, labels in micro_batches:
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / valid
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(trained, float(clip)).item()
    optimizer.step()
    optimizer.zero_grad()
    figures.append((total, norm))
model.save_pretrained(out)
ids = torch.arange(2, 66)[None]
with torch.no_grad():
    ours = PeftModel.from_pretrained(load(base), end)(input_ids=ids).logits
    whole = load(merged)(input_ids=ids).logits
print(json.dumps([figures, (ours - whole).abs().max().item(), ours.std().item()]))
"""


def adapt(config, folder, steps):
    """Run by every rank: losses and norms; exports before, after, and merged."""
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    engine = build_engine(config, mesh)
    engine.export(f"{folder}/start")
    batches = share_of(steps, mesh, config.batch_size_per_gpu)
    found = [tuple(map(float, engine.step(batch))) for batch in batches]
    engine.export(f"{folder}/end")
    engine.config = replace(config, merge_adapter=True)
    engine.export(f"{folder}/merged")
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["qwen2-tied", "llama"])
def test_adapters_train_as_by_peft(name, optimizer, tmp_path, pools):
    """From the same A, on tp 2 x dp 2: losses, norms, adapters; and what PEFT loads."""
    variant = ("padded", 2, optimizer)
    steps = make_steps(*variant[:2])
    torch.save(steps, tmp_path / "steps.pt")
    path = write_model(name, tmp_path, initializer_range=0.2)
    settings = {"lora_rank": 3, "lora_alpha": 4.0, "device": "cpu"}
    config = make_parity_config(path, str(tmp_path), 2, 2, variant, **settings)
    found = pools(4).run(adapt, config, str(tmp_path), steps)[0]
    places = [str(tmp_path / each) for each in ("start", "end", "merged", "steps.pt")]
    out = tmp_path / "peft"
    command = [ELSEWHERE, "-c", ADAPT, path, *places, optimizer, str(MAX_GRAD_NORM)]
    done = subprocess.run([*command, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr
    figures, apart, spread = json.loads(done.stdout.splitlines()[-1])
    for ours, theirs in zip(found, figures, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
    assert apart < 1e-4 < spread
    file = "adapter_model.safetensors"
    ours, theirs = (load_file(place / file) for place in (tmp_path / "end", out))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        off = (tensor - theirs[key]).abs()
        if optimizer == "sgd":
            assert off.max() < 1e-5, key
        assert off.median() < 1e-6, (
            key
        )  # AdamW follows the sign of what rounding leaves
