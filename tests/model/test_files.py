"""A model's files: only those that count; from the Hub once on a node, and whole."""

import json
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.support.hub import GATED, Hub
from tests.support.pool import Pool
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.integrity import digest
from tp2d_lib.model import (
    build_empty_model,
    files,
    headers,
    identity,
    load_model_config,
    weights,
)
from tp2d_lib.model import hub as hub_errors

SHARDS = ["model-1.safetensors", "model-2.safetensors"]
USED = ["config.json", "generation_config.json", files.INDEX, *SHARDS, "vocab.txt"]
# What repositories also hold: other formats, other precisions, a vendor's originals.
OTHERS = [
    "README.md",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "original/consolidated.safetensors",
    "original/params.json",
    "pytorch_model.bin",
]


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in two shards, among files of no use."""
    from tests.support.models import write_model  # here: slow, ranks do not need it

    path = Path(write_model("llama", tmp_path_factory.mktemp("model")))
    tensors = load_file(path / files.SINGLE)
    (path / files.SINGLE).unlink()
    weight_map = {name: SHARDS["norm" in name] for name in tensors}
    for shard in SHARDS:
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, path / shard, {"format": "pt"})
    (path / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (path / "original").mkdir()
    for name in ("vocab.txt", *OTHERS):
        (path / name).write_text("not a safetensors file")
    return path


@pytest.fixture(scope="module")
def ranks(hub, tmp_path_factory):
    """Two ranks of one node that know this Hub and an empty cache."""
    cache = str(tmp_path_factory.mktemp("cache"))
    pool = Pool(2, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_CACHE=cache)
    yield pool
    pool.close()


@pytest.fixture
def repository(hub, folder, request):
    """The model under a name that no cache holds yet."""
    return hub.add(f"someone/{request.node.name.split('[')[0][:60]}", folder)


@pytest.fixture
def config(hub, repository):
    names = {each: name for name, each in hub.repositories.items()}
    return TrainConfig(model_name=names[repository])


def fetched(config, read=files.model_directory):
    """Run by every rank: the files in the folder and their SHA-256, or the sentence."""
    try:
        directory = read(config)
    except ConfigError as error:
        return str(error)
    return {path.name: digest(path) for path in directory.iterdir()}


def expected(folder):
    return {name: digest(folder / name) for name in USED}


def test_a_node_downloads_each_file_once(ranks, config, repository, folder):
    assert ranks.run(fetched, config) == [expected(folder)] * 2
    assert len(repository.requests) == len(set(repository.requests))  # HEAD, GET
    assert repository.downloads() == dict.fromkeys(USED, 1)
    assert ranks.run(fetched, config) == [expected(folder)] * 2
    assert not repository.downloads()


def apart(config, place, commits=None):
    """Run by every rank, as if it were the only one on its node."""
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setattr(socket, "gethostname", lambda: f"node{rank}")
        patch.setattr(constants, "HF_HUB_CACHE", f"{place}/{rank}")
        if commits:
            found = lambda config: Path(place, commits[rank])  # noqa: E731
            patch.setattr(files, "local_directory", found)
        return fetched(config, lambda config: own_directory(config, f"{place}/{rank}"))


def own_directory(config, cache):
    directory = files.model_directory(config)
    assert directory.is_relative_to(cache)
    return directory


def test_each_node_downloads_its_own(ranks, config, repository, folder, tmp_path):
    assert ranks.run(apart, config, str(tmp_path)) == [expected(folder)] * 2
    assert repository.downloads() == dict.fromkeys(USED, 2)


def test_nodes_must_have_the_same_commit(ranks, config, tmp_path):
    for said in ranks.run(apart, config, str(tmp_path), ["a" * 40, "b" * 40]):
        assert said.startswith("model_revision=None must be the same commit on every")
        assert said.endswith(f"try {'a' * 40!r}")


def test_commands_share_a_cache(ranks, config, repository, folder):
    """Two that start at once: neither waits for the other in a process group."""
    both = ranks.run(fetched, config, files.local_directory)
    assert both == [expected(folder)] * 2
    assert repository.downloads() == dict.fromkeys(USED, 1)


def fetched_in_chunks(config):
    """``fetched``, with chunks smaller than the files, as they are in earnest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 10)
        return fetched(config)


def test_a_broken_connection_is_resumed(ranks, config, repository, folder):
    repository.answers = {SHARDS[0]: ["cut"]}
    assert ranks.run(fetched_in_chunks, config) == [expected(folder)] * 2
    parts = [part for method, name, part in repository.requests if name == SHARDS[0]]
    half = (folder / SHARDS[0]).stat().st_size // 2
    assert parts == [None, None, f"bytes={half // 1024 * 1024}-"]  # HEAD, half, rest


def test_half_a_file_is_not_used(ranks, config, repository, folder):
    """Every rank says so; the next start begins with what is whole."""
    repository.answers = {SHARDS[0]: ["cut", 500]}
    first, second = ranks.run(fetched, config)
    assert first == second
    assert first.startswith(f"model_name={config.model_name!r} must be on the Hub at ")
    repository.requests.clear()
    assert ranks.run(fetched, config) == [expected(folder)] * 2
    assert repository.downloads()[SHARDS[0]] == 1
    assert "config.json" not in repository.downloads()


def look(config):
    """Run by a rank, as by a driver: sizes of tensors and digests of files."""
    return headers.read(config), identity.of(config)


def test_the_driver_downloads_no_weights(ranks, config, repository, folder):
    copy = replace(config, model_name=str(folder))
    tensors, digests = ranks.run(look, config)[0]
    assert (tensors, digests) == look(copy)
    assert not set(repository.downloads()) & {*SHARDS, *OTHERS}


def test_an_adapter_is_refused_before_its_download(ranks, hub, folder, tmp_path):
    adapted = shutil.copytree(folder, tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}")
    config = TrainConfig(model_name="someone/adapted")
    repository = hub.add(config.model_name, adapted)
    (said,) = ranks.run(refusals, config, str(tmp_path), headers.read)[0]
    assert "must hold a whole model, but has adapter_config.json; merge" in said
    assert not set(repository.downloads()) & set(SHARDS)


def refusals(config, cache, *readers):
    """Run by a rank with an empty cache: what each reader says of a model."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        for read in readers:
            try:
                read(config)
            except ConfigError as error:
                said.append(str(error))
    return said


READERS = (load_model_config, files.local_directory, headers.read)
PENDING = {**GATED, "X-Error-Message": "Your request is awaiting a review"}
BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("answer", "rule", "remedy"),
    [
        ((401, GATED), "open to you, but is gated", "set HF_TOKEN to a token of"),
        ((403, PENDING), "(Your request is awaiting a review)", "ask for access on"),
        ((401, BAD_TOKEN), "requested with a valid token", "set HF_TOKEN to one from"),
    ],
)
def test_a_refusal_is_one_sentence(
    ranks, config, repository, tmp_path, answer, rule, remedy
):
    repository.refusal = answer
    said = ranks.run(refusals, config, str(tmp_path), *READERS)[0]
    assert len(said) == 3
    for sentence in said:
        assert sentence.startswith(f"model_name={config.model_name!r} must be ")
        assert rule in sentence
        assert remedy in sentence
        assert "\n" not in sentence
    assert not repository.downloads()


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("model_name", "no-such/model", "which shows you none of this name; try 'Q"),
        ("model_revision", "v2", "must be a branch, a tag or a commit of 'someone/"),
    ],
)
def test_what_the_hub_lacks(ranks, config, tmp_path, field, value, rule):
    config = replace(config, **{field: value})
    said = ranks.run(refusals, config, str(tmp_path), *READERS[:2])[0]
    assert len(said) == 2
    for sentence in said:
        assert sentence.startswith(f"{field}={value!r} must be ")
        assert rule in sentence


def offline(config, read):
    """Run by a rank: what it reads without any request to the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        return fetched(config, read)


def test_offline_only_the_cache_is_read(ranks, config, repository, folder):
    """Its folder may hold a part of the model, such as what a driver has read."""
    ranks.run(load_model_config, config)
    repository.requests.clear()
    for sentence in ranks.run(offline, config, files.model_directory):
        assert sentence.endswith("because HF_HUB_OFFLINE=1; try HF_HUB_OFFLINE=0")
    assert not repository.requests
    ranks.run(fetched, config)
    repository.requests.clear()
    assert ranks.run(offline, config, files.model_directory) == [expected(folder)] * 2
    assert not repository.requests


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    """And not the model, nor a file elsewhere that cannot be read."""
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "cache"
    monkeypatch.setattr(constants, "HF_HOME", str(below))
    config = TrainConfig(model_name="someone/model")
    for path, said in ((below / "token", "HF_HOME=.* must be a"), (folder, "model_n")):
        with pytest.raises(NotADirectoryError) as failed:
            (path / "config.json" / "x").mkdir()
        assert re.match(said, str(hub_errors.refused(config, failed.value)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_only_the_files_of_the_index_are_read(folder, tmp_path):
    """From a folder, in which the others are."""
    config = TrainConfig(model_name=str(folder))
    assert [file.name for file in files.weight_files(folder, config)] == SHARDS
    model = build_empty_model(config)
    weights.load_pretrained(model, config, torch.device("cpu"))
    stored = {k: v for shard in SHARDS for k, v in load_file(folder / shard).items()}
    for name, tensor in headers.own_state(model).items():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)
    assert identity.file_digests(config).keys() == set(SHARDS)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", 5])
def test_an_index_names_files_of_its_folder(folder, tmp_path, name):
    index = tmp_path / files.INDEX
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    config = TrainConfig(model_name=str(tmp_path))
    with pytest.raises(ConfigError, match=f"must hold an undamaged {files.INDEX}"):
        files.model_directory(config)


def test_a_release_with_another_default_has_the_same_models(folder, monkeypatch):
    config = TrainConfig(model_name=str(folder))
    before, complete = identity.of(config), LlamaConfig.to_dict
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda hf: complete(hf) | {"new": 1})
    assert identity.of(config) == before


def test_a_model_is_its_configuration_and_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = TrainConfig(model_name=str(copy))
    stored = identity.of(config)
    earlier = {"config": "of all defaults", "weights": stored["weights"]}
    content = json.loads((copy / "config.json").read_text())
    for change, same in (
        ({"transformers_version": "6"}, True),
        ({"rms_norm_eps": 1e-3}, False),
    ):
        (copy / "config.json").write_text(json.dumps(content | change, indent=9))
        assert identity.is_same(stored, config) == same
        assert identity.is_same(earlier, config)
    assert not identity.is_same(earlier | {"weights": "others"}, config)
