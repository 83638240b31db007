"""Strategies: values, flags, files and folders that nobody should have to expect."""

import json

from hypothesis import strategies as st

from tp2d_lib.config import FIELDS
from tp2d_lib.validation import choices, leaves

NAMES = list(FIELDS)
PLACES = ("storage_path", "cache_dir", "export_to")  # where something may be written

EDGES = [-1, 0, 1, 2, 4, 63, 2**31, 2**63, 10**18, 10**4000]
FLOATS = [0.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", " ", "\0", "~\0", "~nobody/x", "a\nb", "\ud800", "ünï", "x" * 300, "nan"]
TEXTS += ["{", "{}", "[", "[]", "null", '{"layer_specs": [1]}', "1e400", "1_000", "%n"]
PATHS = [
    "/dev/null",
    "/dev/null/x",
    "/proc/x",
    "x" * 300,
    "a/" * 3000,
    "file/x",
    "x://",
]
PATHS += ["mem://x", "~nobody/x", "\0", "a\nb", "http://[::1", "./", ".."]
REAL = ["text", "train", "validation", "demo/model", "demo/dataset", "texts", "old"]

texts = st.sampled_from(TEXTS + PATHS) | st.text(max_size=12)
numbers = st.sampled_from(EDGES + FLOATS) | st.integers() | st.floats()
plain = st.none() | st.booleans() | numbers | texts
nested = st.recursive(
    plain, lambda s: st.lists(s, max_size=3) | st.dictionaries(texts, s, max_size=3)
)
wild = plain | st.binary(max_size=5) | nested | st.just(object())
# Inside the current directory, or where nobody can write.
places = st.sampled_from([p for p in PATHS if p not in ("./", "..")]) | st.text(
    st.characters(exclude_characters="/~.:"), min_size=1, max_size=12
)


def value_of(name: str):
    """Values that a field may have, next to any others."""
    if name in PLACES:
        return places
    if name == "resume_from":  # a flag only
        return texts
    hint = FIELDS[name].annotation
    likely = {
        bool: st.booleans(),
        int: st.integers(0, 9),
        float: st.floats(0, 1),
        str: st.sampled_from(choices(hint) or REAL),
    }
    kinds = [kind for kind in (bool, int, float) if kind in leaves(hint)]
    likely = st.one_of(*(likely[kind] for kind in kinds or [str]))
    return st.booleans().flatmap(lambda usual: likely if usual else wild)


@st.composite
def settings_of(draw, names=NAMES, most=3):
    """A few fields with values."""
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=most))
    return {name: draw(value_of(name)) for name in chosen}


@st.composite
def flags_of(draw, flags: dict[str, str]):
    """Arguments of a command; ``flags``: name of a field -> its flag."""
    argv = []
    for name, value in draw(settings_of(sorted(flags))).items():
        form = draw(st.sampled_from(["two", "two", "one", "off", "alone"]))
        argv += {
            "two": [flags[name], shown(value)],
            "one": [f"{flags[name]}={shown(value)}"],
            "off": [f"--no-{flags[name][2:]}"],
            "alone": [flags[name]],
        }[form]
    return argv


def shown(value) -> str:
    too_long = type(value) is int and value.bit_length() > 9999
    return "9" * 5000 if too_long else str(value)


documents = st.lists(
    st.dictionaries(
        st.sampled_from(["text", "text", "id", "", "ünï"]),
        st.one_of(nested, st.just("Some words that make a row. " * 9)),
        max_size=3,
    ),
    max_size=6,
)


@st.composite
def damages(draw, content: bytes) -> bytes:
    """A file's content after a bad copy, a bad disk or a bad editor."""
    kind = draw(st.sampled_from(["cut", "flip", "zero", "other", "json", "json"]))
    at = draw(st.integers(0, max(len(content) - 1, 0)) | st.integers(0, 400))
    if kind == "cut":
        return content[:at]
    if kind in ("flip", "zero"):
        new = (
            bytes([content[at] ^ (1 << draw(st.integers(0, 7)))])
            if content[at:]
            else b""
        )
        new = bytes(draw(st.integers(1, 999))) if kind == "zero" else new
        return content[:at] + new + content[at + len(new) :]
    try:
        tree = json.loads(content) if kind == "json" else None
    except ValueError:
        tree = None
    if isinstance(tree, dict) and tree:
        tree[draw(st.sampled_from(sorted(tree)))] = draw(nested.filter(is_json))
        return json.dumps(tree).encode()
    return draw(st.binary(max_size=40) | nested.filter(is_json).map(as_json))


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def is_json(value) -> bool:
    try:
        return bool(as_json(value))
    except ValueError:  # an integer too long to print
        return False
