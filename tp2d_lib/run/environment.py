"""The driver's environment variables that its workers need, on whatever node."""

from __future__ import annotations

import os
import re

WORKER_ENV = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # slow machines import slowly
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # to wait for a rank that never reports
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # notice reports and the end promptly
    # See torch's ProcessGroupNCCL.hpp and FlightRecorder.hpp, and Ray's nccl_ras.py.
    "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that each rank remembers
    "RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR": "1",  # logs, if NCCL's `ncclras` is there
    "RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S": "60",  # before we end the attempt
}
SENT = re.compile(
    "(HF|AWS|GOOGLE|NCCL|GLOO|TORCH|PYTORCH|CUDA|MLFLOW|WANDB)_|STORAGE_EMULATOR_HOST$"
    # A store, the Hub and MLflow behind a proxy; certificates of whoever runs it.
    "|(?i:https?_proxy|no_proxy|all_proxy)$"
    "|SSL_CERT_(FILE|DIR)$|(REQUESTS|CURL)_CA_BUNDLE$"
)
KEPT = ("CUDA_VISIBLE_DEVICES",)  # Ray sets it on each worker
SECRET = re.compile("TOKEN|SECRET|KEY|PASSWORD|CREDENTIAL")


def to_send() -> tuple[dict[str, str], dict[str, str]]:
    """Variables for the workers, and those of them that are secret.

    Ray writes a worker's ``runtime_env`` into its logs, so secrets must travel with the
    function that it runs: by then nothing has read them, unlike the others, which
    libraries read while they are imported and process groups while they are formed.
    """
    sent = {k: v for k, v in os.environ.items() if SENT.match(k) and k not in KEPT}
    secret = {k: v for k, v in sent.items() if SECRET.search(k) or "@" in v}
    return {k: v for k, v in sent.items() if k not in secret}, secret
