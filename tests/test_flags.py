"""Every field of TrainConfig does something, and a test sees it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.models import write_model
from tests.support.texts import sentences, write_texts
from tp2d_lib import data, fsdp
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.cost import dryrun

TESTS = Path(__file__).parent
SEEN_BY = {
    "model_name": "test_flags:test_a_hub_model_is_read_at_its_revision",
    "model_revision": "test_flags:test_a_hub_model_is_read_at_its_revision",
    "attn_implementation": "test_packing:test_eager_attention_keeps_documents_apart",
    "dataset_name": "data/test_rows:test_other_content_makes_other_rows",
    "dataset_config": "test_flags:test_a_dataset_has_configurations_and_splits",
    "dataset_revision": "data/test_files:"
    "test_a_dataset_on_the_hub_is_read_as_documents",
    "dataset_split": "test_flags:test_a_dataset_has_configurations_and_splits",
    "dataset_percentage": "data/test_rows:test_percentage_takes_the_first_documents",
    "text_column": "data/test_rows:test_missing_text_column",
    "special_tokens_in_text": "data/test_documents:"
    "test_texts_that_a_template_has_written",
    "seq_length": "data/test_rows:test_packed_rows_are_the_joined_documents",
    "pack": "data/test_rows:test_padded_rows_are_one_document_each",
    "train_on": "data/test_chat:test_only_the_assistant_is_trained_on",
    "prepared_data": "test_flags:test_prepared_rows_are_taken_as_they_are",
    "eval_dataset": "run/test_evaluate:test_no_token_is_left_out",
    "eval_split": "run/test_evaluate:test_the_datasets_own_split_is_the_default",
    "eval_fraction": "run/test_evaluate:test_a_hash_decides_what_is_held_out",
    "prepared_eval_data": "run/test_evaluate:"
    "test_equal_on_every_mesh_and_to_one_process",
    "tp_size": "fsdp/test_parity:test_mesh_equals_one_process",
    "dp_size": "fsdp/test_parity:test_mesh_equals_one_process",
    "dp_replicate_size": "fsdp/test_parity:test_mesh_equals_one_process",
    "num_workers": "test_config:test_mesh_not_as_large_as_workers",
    "sequence_parallel": "test_families:test_whole_sequences_equal_one_process",
    "min_dp_size": "test_config:test_min_dp_size",
    "tp_across_nodes": ("run/test_cluster:test_a_tp_group_over_two_nodes_is_refused"),
    "batch_size_per_gpu": "data/test_loader:test_batches_have_the_shape_asked_for",
    "gradient_accumulation_steps": "fsdp/test_parity:test_mesh_equals_one_process",
    "num_epochs": "data/test_loader:test_number_of_steps",
    "max_steps": "data/test_loader:test_number_of_steps",
    "optimizer": "fsdp/test_parity:test_mesh_equals_one_process",
    "learning_rate": "fsdp/test_parity:test_mesh_equals_one_process",
    "lora_rank": "fsdp/test_lora:test_mesh_equals_one_process",
    "lora_alpha": "fsdp/test_lora:test_alpha_weights_and_dropout_drops",
    "lora_dropout": "fsdp/test_lora:test_alpha_weights_and_dropout_drops",
    "lora_target_modules": "fsdp/test_lora:test_some_layers_only",
    "merge_adapter": "fsdp/test_lora:test_exports",
    "adam_beta1": "test_optimizer:test_equal_to_one_process",
    "adam_beta2": "test_optimizer:test_equal_to_one_process",
    "adam_epsilon": "test_optimizer:test_equal_to_one_process",
    "decay": "test_optimizer:test_equal_to_one_process",
    "lr_scheduler_type": "run/test_loop:test_schedules_are_those_of_transformers",
    "min_lr_ratio": "run/test_loop:test_schedules_are_those_of_transformers",
    "warmup_steps": "run/test_loop:test_warm_up_is_linear_and_reaches_the_peak",
    "weight_decay": "test_flags:test_weight_decay_shrinks_weights",
    "max_grad_norm": "fsdp/test_parity:test_reference_clips_and_moves",
    "zero_stage": "cost/test_dryrun:test_prediction_is_what_a_rank_then_holds",
    "partition_config": "autotp/test_partition:test_every_source_equals_one_process",
    "vocab_parallel_lm_head": "autotp/test_partition:test_vocabulary_tied_and_untied",
    "seed": "data/test_loader:test_order_depends_on_seed_and_epoch_only",
    "deterministic": "test_options:test_deterministic_trains_the_same",
    "device": "run/test_launch:test_too_few_gpus_is_said_before_a_worker_starts",
    "dtype": "test_options:test_autocast_computes_in_bfloat16_and_sends_float32",
    "autocast": "test_options:test_autocast_computes_in_bfloat16_and_sends_float32",
    "compile": "test_options:test_compiled_equals_plain",
    "activation_checkpointing": "test_flags:test_settings_that_save_memory_save_it",
    "reshard_after_forward": "test_options:test_fewer_bytes_for_the_same_steps",
    "loss_chunk_tokens": "test_families:test_family_equals_one_process",
    "storage_path": "run/test_launch:test_same_name_goes_on_where_it_stopped",
    "cache_dir": "data/test_rows:test_second_prepare_reuses_rows",
    "run_name": "run/test_launch:test_same_name_goes_on_where_it_stopped",
    "resume_from_checkpoint": "lessons/test_notebooks:test_another_mesh_and_export",
    "eval_every": "test_cli:test_a_run_that_was_interrupted_ends_exactly",
    "checkpoint_every": "run/test_launch:test_same_name_goes_on_where_it_stopped",
    "checkpoint_minutes": "run/test_loop:test_saves_by_time_cost_no_more_than_training",
    "async_checkpoint": "test_cli:test_a_run_that_was_interrupted_ends_exactly",
    "save_total_limit": "run/test_launch:test_same_name_goes_on_where_it_stopped",
    "max_failures": "faults/test_kills:test_two_deaths_are_one_too_many",
    "nonfinite": "run/test_health:test_a_step_that_is_not_finite_stops_or_is_skipped",
    "hang_timeout": "faults/test_hangs:test_a_rank_that_is_stopped_is_replaced",
    "log_interval": "run/test_launch:test_same_name_goes_on_where_it_stopped",
    "export_to": "test_cli:test_a_run_that_was_interrupted_ends_exactly",
    "export_dtype": "model/test_exports:test_weights_have_the_type_asked_for",
}


def test_every_field_is_seen_by_a_test_that_exists():
    assert SEEN_BY.keys() == {field.name for field in fields(TrainConfig)}
    for field, where in SEEN_BY.items():
        file, test = where.split(":")
        tree = ast.parse((TESTS / f"{file}.py").read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test in names, (field, where)


@pytest.fixture
def config(demo_paths, tmp_path):
    model_name, dataset_name = demo_paths
    return TrainConfig(
        model_name=model_name,
        dataset_name=dataset_name,
        seq_length=64,
        storage_path=str(tmp_path),
        device="cpu",
    )


HUB = """
import sys
from tp2d_lib import data, fsdp, model
from tp2d_lib.config import TrainConfig
from tp2d_lib.model import weights

dataset, storage, revision = sys.argv[1:]
for model_revision in (None, revision):
    config = TrainConfig(
        model_name="someone/tiny",
        model_revision=model_revision,
        dataset_name=dataset,
        seq_length=64,
        storage_path=storage,
    )
    fsdp.check(config)
    data.prepare(config)
    folder = weights.model_directory(config).name
    print(folder, model.load_model_config(config).hidden_size)
"""


@pytest.mark.ranks
def test_a_hub_model_is_read_at_its_revision(demo_paths, tmp_path):
    """From a cache as the Hub's own library keeps it; nothing of it is in a folder."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for revision, size in (("a" * 40, 64), ("b" * 40, 96)):
        folder = repository / "snapshots" / revision
        path = write_model("llama", folder.parent, hidden_size=size, vocab_size=2048)
        Path(path).rename(folder)
        for file in Path(demo_paths[0]).glob("tokenizer*"):
            shutil.copy(file, folder)
    (repository / "refs" / "main").write_text("a" * 40)
    own = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    command = [sys.executable, "-c", HUB, demo_paths[1], str(tmp_path), "b" * 40]
    run = subprocess.run(
        command, env={**os.environ, **own}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{'a' * 40} 64", f"{'b' * 40} 96"]


def test_a_dataset_has_configurations_and_splits(config, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_texts(folder / "first", sentences(30))
    write_texts(folder / "second", sentences(60))
    write_texts(folder / "second", sentences(20), split="test")
    cards = [
        {
            "config_name": part,
            "data_files": [
                {"split": split, "path": f"{part}/{split}.jsonl"} for split in splits
            ],
        }
        for part, splits in (("first", ["train"]), ("second", ["train", "test"]))
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(cards)}\n---\n")
    config = replace(config, dataset_name=str(folder), pack="none")

    def documents(**settings):
        rows = data.prepare(replace(config, **settings))
        return len(np.load(rows / "lengths.npy"))

    assert documents(dataset_config="first") == 30
    assert documents(dataset_config="second") == 60
    assert documents(dataset_config="second", dataset_split="test") == 20


def test_so_many_processes_tokenize(monkeypatch):
    """As many as are worth it, but no more than there are cores."""
    monkeypatch.setattr("loky.cpu_count", lambda: 2)
    sizes = [size * data.workers.MANY for size in (0, 0.9, 1, 99)]
    assert [data.workers.processes(size) for size in sizes] == [1, 1, 2, 2]


def test_prepared_rows_are_taken_as_they_are(config):
    rows = data.prepare(config)
    assert data.prepare(replace(config, dataset_name="gone", prepared_data=str(rows)))


def train(config):
    """Run by one rank: weights after three steps whose gradients are all but zero."""
    from tp2d_lib.data import build_dataloader
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(1, 1, "cpu")
    engine = build_engine(config, mesh)
    for _, batch in zip(range(3), build_dataloader(config, mesh), strict=False):
        engine.step(batch)
    weights = engine.model.named_parameters()
    return {name: p.full_tensor().norm().item() for name, p in weights}


def test_weight_decay_shrinks_weights(config, pools):
    still = replace(
        config, optimizer="sgd", learning_rate=0.1, max_grad_norm=1e-9, weight_decay=0.0
    )
    kept, shrunk = (
        pools(1).run(train, replace(still, weight_decay=decay))[0]
        for decay in (0.0, 0.5)
    )
    for name, norm in kept.items():
        expected = norm * (1 - 0.1 * 0.5) ** 3
        assert shrunk[name] == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.ranks
def test_settings_that_save_memory_save_it(config):
    plain, selective, full = (
        dryrun.predict("fsdp", replace(config, activation_checkpointing=kind))
        for kind in ("none", "selective", "full")
    )
    assert selective["activations"] < 0.9 * plain["activations"]
    # The weights of a model this small are among them: they stay gathered.
    assert full["activations"] < 0.9 * selective["activations"]


def test_a_checkpoint_that_is_not_there_is_said_in_the_driver(config):
    gone = replace(config, resume_from_checkpoint="/gone", run_name="x")
    with pytest.raises(ConfigError, match="resume_from_checkpoint='/gone' must be a"):
        fsdp.check(gone)
