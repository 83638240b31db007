"""What people's records hold, and which of it is trained on."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data.test_rows import refuse
from tests.support.chats import STYLES, rows_of, trained_parts
from tests.support.texts import write_lines
from tp2d_lib import data
from tp2d_lib.config import ConfigError
from tp2d_lib.data.encode import Encoder

END = "<|im_end|>"
SAYS = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
SHARED = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]
CALL = {"name": "add", "arguments": {"a": 1, "b": None}}
CALLED = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' + END


def turn(content, role="assistant", **more) -> dict:
    return {"role": role, "content": content, **more}


def calls(*given, **more) -> list[dict]:
    return [SAYS[0], turn(None, tool_calls=list(given), **more)]


FORMS = {
    "messages": ({"messages": SAYS}, ["say"]),
    "beside text": ({"text": "other", "messages": SAYS, "id": 1}, ["say"]),
    "conversations": ({"conversations": SAYS}, ["say"]),
    "ShareGPT": ({"conversations": SHARED}, ["say"]),
    "ShareGPT's tools": (
        {
            "conversations": [
                SHARED[0],
                {
                    "from": "function_call",
                    "value": json.dumps(CALL | {"arguments": {}}),
                },
                {"from": "observation", "value": "4"},
                {"from": "model", "value": "four"},
            ]
        },
        ['<tool_call>{"name": "add", "arguments": {}}</tool_call>', "four"],
    ),
    "system": ({"messages": SAYS, "system": "Be brief."}, ["say"]),
    "as JSON text": ({"messages": json.dumps(SAYS)}, ["say"]),
    "answers like JSON": (
        {"messages": [SAYS[0], turn('{"a": "007"}'), SAYS[0], turn("null")]},
        ['{"a": "007"}', "null"],
    ),
    "parts": (
        {"messages": [SAYS[0], turn([{"type": "text", "text": "say"}])]},
        ["say"],
    ),
    "parts of values": (
        {"messages": [turn([{"value": "ask"}], "user"), turn(["s", {"text": "ay"}])]},
        ["say"],
    ),
    "weights": (
        {
            "messages": [
                *[SAYS[0], turn("one", weight=0), SAYS[0], turn("two", weight=1)],
                *[SAYS[0], turn("three", train=False), turn("four", loss_weight=0.0)],
            ]
        },
        ["two"],
    ),
    "assistant first": ({"messages": [turn("hello"), *SAYS]}, ["hello", "say"]),
    "two in a row": ({"messages": [SAYS[0], turn("one"), turn("two")]}, ["one", "two"]),
    "user last": ({"messages": [*SAYS, SAYS[0]]}, ["say"]),
    "same words": ({"messages": [*SAYS, turn("say", "user"), SAYS[1]]}, ["say", "say"]),
    "Alpaca": ({"instruction": "ask", "input": "", "output": "say"}, ["say"]),
    "Alpaca's history": (
        {
            "instruction": "i",
            "output": "say",
            "history": [["ask", "no"]],
            "system": "s",
        },
        ["say"],
    ),
    "question": ({"question": "ask", "answer": "say"}, ["say"]),
    "messages of a pair": ({"prompt": SAYS[:1], "completion": SAYS[1:]}, ["say"]),
    "call": ({"messages": calls({"type": "function", "function": CALL})}, CALLED),
    "call as JSON text": (
        {"messages": calls({"function": CALL | {"arguments": '{"a": 1}'}})},
        CALLED,
    ),
    "parts of LLaMA-Factory": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "ask"}]},
                turn([{"type": "tool_call", "value": json.dumps(CALL)}]),
            ]
        },
        CALLED,
    ),
    "bare call": ({"messages": calls(CALL)}, CALLED),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_of_a_record_is_trained_on(chat, name):
    record, expected = FORMS[name]
    if isinstance(expected, list):
        expected = [text + END for text in expected]
    found = trained_parts(chat("qwen", [record]))
    assert found == [[expected] if isinstance(expected, str) else expected]


def test_the_same_of_a_table(chat, tmp_path):
    """In Parquet each struct has the keys of all; those left empty are not there."""
    tools = [
        {
            "type": "function",
            "function": {"name": name, "parameters": {key: {"t": "x"}}},
        }
        for name, key in (("weather", "city"), ("add", "number"))
    ]
    records = [{"messages": SAYS, "tools": [tool]} for tool in tools]
    config = chat("qwen", records)
    expected = rows_of(config)
    table = tmp_path / "table"
    table.mkdir()
    parquet.write_table(pa.Table.from_pylist(records), table / "a.parquet")
    assert rows_of(replace(config, dataset_name=str(table))) == expected
    as_text = [r | {"tools": json.dumps(r["tools"])} for r in records]
    assert rows_of(replace(config, dataset_name=write_lines(tmp_path / "t", as_text)))
    template = Path(config.model_name, "chat_template.jinja")
    template.write_text("{{ tools | tojson }}" + template.read_text())
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    for name in (config.dataset_name, table, tmp_path / "t"):
        texts = [
            tokenizer.decode(ids)
            for ids, _ in rows_of(replace(config, dataset_name=str(name)))
        ]
        assert [text[: text.index("<")] for text in texts] == [
            json.dumps(each) for each in ([tool] for tool in tools)
        ]


def test_a_text_that_reads_like_messages_is_text(make, tmp_path):
    name = write_lines(tmp_path / "texts", [{"text": json.dumps(SAYS)}])
    config = make(dataset_name=name, pack="none", seq_length=128)
    rows = data.open_rows(data.prepare(config))
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    assert tokenizer.decode(rows.input_ids[0]).startswith(json.dumps(SAYS))
    write_lines(tmp_path / "texts", [{"text": SAYS}])
    assert "must have a chat template" in refuse(config)


def test_several_processes_encode_the_same(chat, monkeypatch):
    """In order, and what one of them refuses is told as ever."""
    monkeypatch.setattr("tp2d_lib.data.workers.CHUNK", 3)
    records = [
        {"messages": [turn(f"ask {n}", "user"), turn(f"say {n}")]} for n in range(9)
    ]
    one = rows_of(chat("qwen", records))
    monkeypatch.setattr("tp2d_lib.data.tokens.processes", lambda size: 2)
    other = chat("qwen", records)
    assert rows_of(replace(other, cache_dir=other.cache_dir + "-2")) == one
    records[7]["messages"][1]["content"] = "\ud800"
    assert "not line 8 of" in refuse(chat("qwen", records))


def test_instructions_without_a_template(make, tmp_path):
    records = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    config = make(
        dataset_name=write_lines(tmp_path / "a", records), pack="none", seq_length=128
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    ((ids, _),) = rows_of(config)
    assert tokenizer.decode(ids).endswith(
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|endoftext|>"
    )
    assert trained_parts(config) == [["3<|endoftext|>"]]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "'chosen' and 'rejected'), whi",
        ),
        (
            {"chosen_messages": SAYS, "rejected_messages": SAYS},
            "and 'rejected_messages'",
        ),
        ({"id": 5, "tags": ["a"]}, "there is no text in"),
        ({"messages": SAYS, "label": True}, "('label'), which KTO trains"),
        (
            {"messages": [SAYS[0], turn([{"type": "image_url"}])]},
            "a part of type 'image",
        ),
        (
            {"messages": [{"from": "a", "text": "b"}]},
            "a message without role and conte",
        ),
        ({"messages": [SAYS[0], turn("a", weight=0.5)]}, "gives a turn the weight 0.5"),
        (
            {"messages": [SAYS[0], turn({"a": 1})]},
            "holds dict as content instead of te",
        ),
        ({"messages": [1, 2]}, "no messages with role and content in 'messages'"),
        ({"messages": SAYS, "tools": 5}, "holds int in 'tools' instead of a list"),
        ({"messages": [SAYS[0], turn("x", "narrator")]}, "are 'narrator', 'user'; try"),
        ({"prompt": "a", "completion": 5}, "holds int in 'completion' instead of text"),
        ({"instruction": "a", "output": ["b"]}, "holds list in 'output' instead of te"),
        ({"body": "some words", "id": "x"}, "must be given for"),
        ({"body": "some words", "id": "x"}, "; try 'body'"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_on_is_named(chat, record, sentence):
    assert sentence in refuse(chat("qwen", [record]))


# ---------------------------------------------------------------- special tokens


def test_texts_that_a_template_has_written(chat):
    """Their control tokens become tokens, and the end is there once."""
    texts = [f"<|im_start|>user\nq{n}<|im_end|>\n<|endoftext|>" for n in range(5)]
    config = chat("qwen", [{"text": text} for text in texts])
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    rows = data.open_rows(data.prepare(config))
    for ids, length, text in zip(rows.input_ids, rows.lengths, texts, strict=True):
        assert ids[:length].tolist() == tokenizer(text)["input_ids"]
    said = data.describe(data.prepare(config))
    assert "special tokens in texts are those tokens" in said
    asked = replace(config, special_tokens_in_text="text")
    rows = data.open_rows(data.prepare(asked))
    special = {*tokenizer.all_special_ids}
    assert all(
        not special & {*ids[: n - 1]} for ids, n in zip(rows[0], rows[1], strict=True)
    )
    assert "special tokens" not in data.describe(data.prepare(asked))


def test_a_tokenizer_that_ends_every_text_itself(make, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(make().model_name)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    config = Path(make().model_name, "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(config)
    given = {"model_name": str(tmp_path / "model"), "pack": "none"}
    for record in ({"text": "one two"}, {"prompt": "one", "completion": " two"}):
        name = write_lines(tmp_path / "texts", [record])
        rows = data.open_rows(data.prepare(make(dataset_name=name, **given)))
        ids = rows.input_ids[0, : rows.lengths[0]].tolist()
        assert ids == [
            *tokenizer("one two", add_special_tokens=False)["input_ids"],
            end[1],
        ]
        if rows.loss_mask is not None:  # of what begins with a space, and of the end
            assert rows.loss_mask[0, : len(ids)].tolist() == [
                tokenizer.decode(token).startswith((" ", end[0])) for token in ids
            ]


@pytest.mark.parametrize("style", STYLES)
def test_thoughts_between_special_tokens_are_the_tokenizers(chat, style):
    """Without a forged frame, the ids are those of ``apply_chat_template``."""
    thought = "<think>\nBecause.\n</think>\n\nFour."
    messages = [SAYS[0], turn(thought), turn("And?", "user"), turn(thought)]
    config = chat(style, [{"messages": messages}])
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    more = {"additional_special_tokens": ["<think>", "</think>"]}
    tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(config.model_name)
    path = Path(config.model_name, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 4096}))
    ((ids, _),) = rows_of(config)
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == expected
    assert tokenizer.convert_tokens_to_ids("<think>") in ids


# ---------------------------------------------------------------- templates

QWEN = STYLES["qwen"][0].replace("OPEN", "").replace("CLOSE", "")


def with_template(config, template: str):
    """The same model with another template, and no rows of the first one."""
    Path(config.model_name, "chat_template.jinja").write_text(template)
    return config


def test_a_prompt_that_opens_a_thought(chat):
    opens = QWEN.replace(
        "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
    )
    assert opens != QWEN
    config = with_template(chat("qwen", [{"messages": [*SAYS, *SAYS]}]), opens)
    assert trained_parts(config) == [["say" + END] * 2]


def test_a_template_that_needs_a_user(chat):
    strict = "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    strict += "{{ raise_exception('No user query') }}{% endif %}" + QWEN
    config = with_template(chat("qwen", [{"messages": [turn("hi"), *SAYS]}]), strict)
    assert trained_parts(config) == [["hi" + END, "say" + END]]


def test_a_template_that_ends_a_conversation_in_another_way(chat):
    last = QWEN + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    config = with_template(chat("qwen", [{"messages": [*SAYS, *SAYS]}]), last)
    assert trained_parts(config) == [["say" + END] * 2]  # the other is no turn's own


def test_forms_that_a_template_takes(chat):
    """Arguments as text only, parts only, no null: each gets what it takes."""
    parts = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    record = {"messages": calls(CALL)}
    as_text = QWEN.replace("c.function | tojson", "c.function.arguments")
    config = with_template(chat("qwen", [record]), as_text)
    assert trained_parts(config) == [['<tool_call>{"a": 1}</tool_call>' + END]]
    null = QWEN.replace(
        "{% if m.content %}{{ m.content }}{% endif %}", "{{ m.content }}"
    )
    assert "None" not in trained_parts(with_template(config, null))[0][0]
    config = chat("qwen", [{"messages": SAYS}])
    only = QWEN.replace("{{ m.content }}", parts).replace(
        "+ m.content +", f"}}}}{parts}{{{{"
    )
    assert trained_parts(with_template(config, only)) == [["say" + END]]


def test_what_a_template_leaves_out_is_told(chat):
    """Thoughts that it does not write, and an end of turns, without which none ends."""
    thinks = [{"type": "reasoning", "value": "Why"}, {"type": "text", "value": "say"}]
    config = chat("qwen", [{"messages": [SAYS[0], turn(thinks)]}])
    assert trained_parts(config) == [["say" + END]]
    said = "1 thoughts that the template does not write"
    assert said in data.describe(data.prepare(config))
    writes = QWEN.replace(
        "{% if m.content %}", "{{ m.reasoning_content }}|{% if m.content %}"
    )
    assert trained_parts(with_template(config, writes)) == [["Why|say" + END]]
    assert said not in data.describe(data.prepare(config))
    endless = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    with_template(config, endless + "{% endfor %}")
    assert trained_parts(config) == [["\nsay"]]  # no prompt says where it begins
    assert "the template ends no turn" in data.describe(data.prepare(config))


def test_one_date_for_all_rows_of_a_run(chat, monkeypatch):
    """The template's date is of the day on which the rows were made, and is told."""
    dated = "{{ strftime_now('%d %b %Y, %A') + '\n' }}" + QWEN
    config = with_template(chat("qwen", [{"messages": SAYS}]), dated)
    rows, today = data.prepare(config), date.today()
    assert f"the template's date is {today}" in data.describe(rows)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    ((ids, _),) = rows_of(config)
    text = tokenizer.decode(ids)
    assert text.startswith(today.strftime("%d %b %Y, %A\n"))

    class Later(date):
        @classmethod
        def today(cls):
            return cls(2040, 1, 1)

    monkeypatch.setattr("tp2d_lib.data.reading.date", Later)
    assert data.prepare(config) == rows  # a retry on another day resumes the run
    other = replace(config, cache_dir=config.cache_dir + "-other")
    assert data.prepare(other).name.endswith("-2040-01-01")
    assert "01 Jan 2040, Sunday" in tokenizer.decode(rows_of(other)[0][0])


def test_options_of_a_template(chat):
    wanted = QWEN + "{% if shout %}{{ 'LOUD' }}{% endif %}"
    records = [{"messages": SAYS, "chat_template_kwargs": {"shout": s}} for s in (1, 0)]
    config = with_template(chat("qwen", records), wanted)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    texts = [tokenizer.decode(ids) for ids, _ in rows_of(config)]
    assert [text.endswith("LOUD") for text in texts] == [True, False]


# ---------------------------------------------------------------- whatever it is

TEXT = st.text(max_size=8) | st.sampled_from(["ask", END, "[1]", '{"a": 1}', "\ud800"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt"])
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLE | ANY,
        "from": ROLE | ANY,
        "content": TEXT | ANY,
        "value": TEXT | ANY,
        "tool_calls": ANY | st.just([CALL]),
        "weight": st.sampled_from([0, 1, None]) | ANY,
    },
)
COLUMNS = ["text", "messages", "conversations", "prompt", "completion", "instruction"]
COLUMNS += ["output", "question", "answer", "tools", "system", "label", "x"]
RECORD = st.dictionaries(
    st.sampled_from(COLUMNS), TEXT | ANY | st.lists(MESSAGE, max_size=4), max_size=4
)


@pytest.fixture(scope="module")
def wild_model(demo_paths, tmp_path_factory):
    from tests.support.chats import write_chat_model

    folder = tmp_path_factory.mktemp("wild")
    return folder, write_chat_model(demo_paths[0], folder, "qwen")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    records=st.lists(RECORD, min_size=1, max_size=4),
    parses=st.sampled_from([None, "parse"]),
)
def test_any_record_makes_rows_or_a_sentence(wild_model, records, parses):
    from tp2d_lib.config import TrainConfig

    folder, model = wild_model
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = TrainConfig(
        model_name=model,
        dataset_name=str(folder / "a.jsonl"),
        seq_length=64,
        cache_dir=str(folder / "rows"),
        special_tokens_in_text=parses,
    )
    said, rows = "; try ", None
    try:
        rows = data.open_rows(data.prepare(config))
    except ConfigError as error:
        said = str(error)
    assert "; try " in said
    assert "\n" not in said
    assert rows is None or (rows.lengths > 1).all()


class Louder(PreTrainedTokenizerFast):
    """Does more than its backend, as CPM's does."""

    def __call__(self, text, *args, **kwargs):
        texts = [text] if isinstance(text, str) else text
        return super().__call__([each.upper() for each in texts], *args, **kwargs)


@pytest.mark.parametrize("parses", [True, False])
@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, Louder])
def test_texts_become_what_the_tokenizers_call_returns(demo_paths, parses, kind):
    tokenizer = kind.from_pretrained(demo_paths[0])
    tokenizer.backend_tokenizer.enable_truncation(3)  # as some files say
    special = tokenizer.eos_token
    texts = [
        "one two",
        f"{special} a{special}b",
        "äöü 漢字 \U0001f600",
        " ",
        "x" * 5000,
    ]
    asked = tokenizer(texts, split_special_tokens=not parses)["input_ids"]
    found = Encoder(tokenizer, "assistant", parses, None)(texts)
    end = tokenizer.eos_token_id
    for ids, (got, trained) in zip(asked, found, strict=True):
        assert got == ids + [end] * (ids[-1:] != [end])
        assert trained is None
