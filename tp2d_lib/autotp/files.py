"""How DeepSpeed's checkpoints are written: hashed on the way."""

from __future__ import annotations

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from tp2d_lib.integrity import HashedFile


class HashingCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own; the files are hashed while they are written."""

    def save(self, state_dict, path: str) -> None:
        with HashedFile(path) as file:
            torch.save(state_dict, file)
