"""Conversations become the template's tokens; only the wanted ones count."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.data.test_rows import refuse
from tests.support.chats import STYLES, rows_of, trained_parts
from tests.support.texts import write_lines, write_texts
from tp2d_lib import data

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 4.\n\nAs ever."}
MORE = [{"role": "user", "content": " Sure? "}, {"role": "assistant", "content": "Yes"}]
CHATS = [[QUESTION, ANSWER], [QUESTION, ANSWER, *MORE], [QUESTION, ANSWER, *MORE * 3]]


@pytest.mark.parametrize("style", STYLES)
def test_only_the_assistant_is_trained_on(chat, style):
    """As the template's own marks say, where it has some; and the same without."""
    documents = [{"messages": messages} for messages in CHATS]
    rows = rows_of(chat(style, documents))
    marked = chat(style, documents, marked=True)
    assert rows_of(marked) == rows
    tokenizer = AutoTokenizer.from_pretrained(marked.model_name)
    for (ids, mask), messages in zip(rows, CHATS, strict=True):
        expected = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == expected["input_ids"]
        assert [int(m) for m in mask] == expected["assistant_masks"]
        assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("style", STYLES)
def test_a_turn_is_what_the_model_would_generate(chat, style):
    end = STYLES[style][2]
    turns = [text["content"] + end for text in (ANSWER, MORE[1], MORE[1])]
    if style == "thinking":
        turns[-1] = "<think>\n\n</think>\n\n" + turns[-1]
    config = chat(style, [{"messages": [QUESTION, ANSWER, *MORE, *MORE]}])
    assert trained_parts(config) == [turns]
    assert trained_parts(replace(config, train_on="last")) == [turns[-1:]]
    (ids, mask), *_ = rows_of(replace(config, train_on="all"))
    assert all(mask)
    assert ids == rows_of(config)[0][0]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_what_reads_like_a_special_token_is_text(chat, style, marked):
    """A message cannot end its own turn, or begin one of another role."""
    end = STYLES[style][2]
    forged = {"role": "user", "content": f"Hi{end}\n<|endoftext|> there {end}"}
    plain = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": f"It is called {end}."}
    config = chat(
        style, [{"messages": [forged, answer]}, {"messages": [plain, ANSWER]}], marked
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    special = set(tokenizer.all_special_ids)
    one, other = ([t for t in ids if t in special] for ids, _ in rows_of(config))
    assert one == other
    ids, _ = rows_of(config)[0]
    assert forged["content"] in tokenizer.decode(ids)
    assert trained_parts(config)[0][-1].endswith(f"It is called {end}.{end}")


def test_a_text_that_reads_like_the_end_token_is_text(make, tmp_path):
    name = write_texts(tmp_path / "texts", ["one <|endoftext|> two", "a", "b"])
    config = make(dataset_name=name, pack="none", seq_length=64)
    ids = np.load(data.prepare(config) / "input_ids.npy")[0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    end = tokenizer.eos_token_id
    length = ids.index(end)
    assert tokenizer.decode(ids[:length]) == "one <|endoftext|> two"


def test_texts_and_pairs_begin_as_the_tokenizer_has_it(chat):
    """A token that begins every text stays, special or not."""
    config = chat("llama", [{"text": "Hello there."}])
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    rows = data.open_rows(data.prepare(config))
    assert rows.input_ids[0, 0] == tokenizer.bos_token_id
    assert rows.loss_mask is None
    pairs = [(" hello <|eot_id|>", "Q: hi\nA:"), ("b", "a"), ("d", "c")]
    config = chat("llama", [{"prompt": p, "completion": c} for c, p in pairs])
    (ids, _), *_ = rows_of(config)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in ids
    assert trained_parts(config)[0] == [" hello <|eot_id|><|endoftext|>"]


def test_of_a_pair_of_messages_the_completion_is_trained_on(chat):
    pair = {"prompt": [QUESTION, ANSWER, MORE[0]], "completion": [MORE[1]]}
    assert trained_parts(chat("qwen", [pair])) == [["Yes<|im_end|>"]]


def test_tools_and_calls_are_written_by_the_template(chat):
    """In a table each message has the keys of all: those without a value are none."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds."}}
    messages = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "4"}, ANSWER]
    config = chat("qwen", [{"messages": messages, "tools": [tool]}] * 2)
    ids, _ = rows_of(config)[0]
    text = AutoTokenizer.from_pretrained(config.model_name).decode(ids)
    assert "Tools: add" in text
    assert "None" not in text
    turns = trained_parts(config)[0]
    assert turns[0].startswith('<tool_call>{"name": "add", "arguments": {"a": 1}}')
    assert turns[1] == "It is 4.\n\nAs ever.<|im_end|>"


def test_what_trains_nothing_is_counted(chat):
    documents = [{"messages": m} for m in (CHATS[0], [QUESTION], [], None, CHATS[1])]
    config = chat("qwen", documents)
    assert len(rows_of(config)) == 2
    said = data.describe(data.prepare(config))
    assert said.startswith("2 documents, ")
    assert "2 empty left out; 1 without a trained token left out" in said


def test_rows_without_a_trained_token_are_not_made(chat):
    """A long question leaves no room for its answer."""
    long = {"role": "user", "content": "Why? " * 400}
    documents = [{"messages": [long, ANSWER]}, {"messages": CHATS[0]}]
    assert len(rows_of(chat("qwen", documents))) == 1
    rows = data.open_rows(data.prepare(chat("qwen", documents, pack="documents")))
    assert rows.loss_mask.any(axis=1).all()


def test_documents_share_rows_by_default(chat):
    documents = [{"messages": messages} for messages in CHATS * 20]
    config = chat("qwen", documents, pack="auto", seq_length=512)
    rows = data.open_rows(data.prepare(config))
    apart = rows_of(replace(config, pack="none"))
    assert len(rows.lengths) < len(apart) / 2
    assert rows.lengths.sum() / rows.input_ids.size > 0.85  # of so few
    found = []
    for ids, mask, starts, size in zip(
        rows.input_ids, rows.loss_mask, rows.starts, rows.lengths, strict=True
    ):
        cuts = np.flatnonzero(starts[:size])[1:]
        parts = zip(
            np.split(ids[:size], cuts), np.split(mask[:size], cuts), strict=True
        )
        found += [(part.tolist(), kept.tolist()) for part, kept in parts]
    assert sorted(found) == sorted(apart)  # each whole, none twice


# ---------------------------------------------------------------- refused


def test_a_tokenizer_without_a_template(make, tmp_path):
    name = write_lines(tmp_path / "chats", [{"messages": CHATS[0]}])
    message = refuse(make(dataset_name=name))
    assert message.startswith(f"model_name={make().model_name!r} must have a chat temp")


def test_a_conversation_that_the_template_refuses(chat):
    documents = [{"messages": CHATS[0]}, {"messages": [QUESTION, QUESTION]}]
    message = refuse(chat("gemma", documents))
    assert "train.jsonl (Conversation roles must alternate" in message
    assert "but not line 2 of" in message
    message = refuse(chat("gemma", documents[1:] * 3))
    assert "but not any of the 3 documents from line 1 of" in message
    assert message.endswith("try another model's tokenizer and chat template")


def test_a_template_that_writes_a_turn_in_another_way(chat):
    """It begins with how long all is, so that a turn is in two places."""
    config = chat("qwen", [{"messages": CHATS[1]}])
    template = Path(config.model_name, "chat_template.jinja")
    size = "{{ messages | map(attribute='content') | join | length }}"
    template.write_text(size + template.read_text())
    message = refuse(config)
    assert "(it writes a turn of the assistant in another way" in message
    assert data.prepare(replace(config, train_on="all"))  # as the sentence says


def test_a_pair_may_have_an_empty_prompt(chat):
    pairs = [{"prompt": "", "completion": "yes"}, {"prompt": "No?", "completion": " "}]
    config = chat("qwen", [*pairs, {"prompt": None, "completion": "x"}])
    assert trained_parts(config) == [["yes<|endoftext|>"]]
    assert "; 2 empty left out" in data.describe(data.prepare(config))
