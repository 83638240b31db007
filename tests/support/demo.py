"""Configurations of the demo model with one global batch on every mesh."""

from tp2d_lib.config import TrainConfig

GLOBAL_BATCH = 4


def make_config(paths, storage, tp_size, dp_size, **settings):
    return TrainConfig(
        model_name=paths[0],
        dataset_name=paths[1],
        tp_size=tp_size,
        dp_size=dp_size,
        seq_length=64,
        batch_size_per_gpu=GLOBAL_BATCH // dp_size,
        learning_rate=1e-2,
        storage_path=str(storage),
        **settings,
    )
