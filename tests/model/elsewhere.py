"""Exports as transformers 4.57 reads them, in an environment of its own.

``make test-exports`` makes the environment and runs this; ``make test`` does not.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.test_exports import ENGINES, export, write_older
from tests.support.demo import make_config
from tests.support.models import write_model

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
