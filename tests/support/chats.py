"""Tokenizers with chat templates in the styles of three families, built locally."""

import shutil
from pathlib import Path

import numpy as np
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp2d_lib import data

# What the assistant generates stands between OPEN and CLOSE.
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"
LOOP = "{% for m in messages %}"
QWEN = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.' }}"
    "{% if tools %}{{ '\nTools: ' + tools[0].function.name }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}" + LOOP + "{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}OPEN"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}CLOSE{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts stay only in turns after the last question; the last one always has some.
THINKING = (
    "{% set last = messages | map(attribute='role') | list | length - 1 %}"
    + LOOP
    + "{% set thought = '<think>\n\n</think>\n\n' if loop.index0 == last else '' %}"
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}OPEN"
    "{{ thought + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>' }}CLOSE"
    "{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}" + LOOP + "{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}OPEN"
    "{{ m.content | trim + '<|eot_id|>' }}CLOSE"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}"
    "{% endif %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}OPEN"
    "{{ m.content | trim + '<end_of_turn>' }}CLOSE{{ '\n' }}"
    "{% else %}{{ '<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
STYLES = {  # template, special tokens, end of a turn
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama": (
        LLAMA,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
}


def write_chat_model(demo_model: str, folder: Path, style: str, marked=False) -> str:
    """The demo model with another tokenizer, and embeddings for its tokens."""
    template, special, _ = STYLES[style]
    path = shutil.copytree(demo_model, folder / f"{style}{'-marked' * marked}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if "bos_token" in template:  # such a tokenizer puts it before plain text, too
        tokenizer.bos_token = special[0]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{special[0]} $A",
            special_tokens=[(special[0], tokenizer.bos_token_id)],
        )
    marks = (OPEN, CLOSE) if marked else ("", "")
    tokenizer.chat_template = template.replace("OPEN", marks[0]).replace(
        "CLOSE", marks[1]
    )
    tokenizer.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(path)
    return str(path)


def rows_of(config) -> list[tuple[list[int], list[bool]]]:
    """The ids of each row and whether they count, without padding."""
    rows = data.open_rows(data.prepare(config))
    return [
        (rows.input_ids[n, :size].tolist(), rows.loss_mask[n, :size].tolist())
        for n, size in enumerate(rows.lengths)
    ]


def trained_parts(config) -> list[list[str]]:
    """The texts that are trained on, in each row."""
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    found = []
    for ids, mask in rows_of(config):
        cuts = np.flatnonzero(np.diff(np.array(mask, int))) + 1
        parts = zip(np.split(ids, cuts), np.split(mask, cuts), strict=True)
        found.append([tokenizer.decode(part) for part, mask in parts if mask[0]])
    return found
