"""Metrics sent to MLflow, if it is installed, through Ray Train's callbacks."""

from __future__ import annotations

import os
from dataclasses import asdict

from ray.train import UserCallback

from tp2d_lib.config import ConfigError, TrainConfig

EXPERIMENT = "tp2d"


def check_installed() -> None:
    try:
        import mlflow  # noqa: F401  # here, and below: it is optional
    except ImportError as error:
        raise ConfigError(
            "report_to='mlflow' must find the MLflow library, which is not installed; "
            "try pip install mlflow-skinny, or omit report_to"
        ) from error


class MLflowCallback(UserCallback):
    """One MLflow run: the configuration as parameters, log records as metrics.

    Created in the driver; Ray calls ``after_report`` in a process of its own. The
    server is set by MLflow's environment variables, such as MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: MLflow is not installed, or its server does not respond.
    """

    def __init__(self, config: TrainConfig):
        check_installed()
        import mlflow

        self.uri = mlflow.get_tracking_uri()
        own = {name for name in os.environ if name.startswith("MLFLOW_")}
        self.environment = {name: os.environ[name] for name in own}  # such as a token
        try:
            self.run_id = self.start(config)
        except mlflow.MlflowException as error:
            raise ConfigError(
                f"report_to='mlflow' must find a server at {self.uri!r} "
                f"({str(error).split('. ')[0].strip()}); try "
                "MLFLOW_TRACKING_URI=http://127.0.0.1:5000 and 'mlflow server'"
            ) from error

    def start(self, config: TrainConfig) -> str:
        client = self.client()
        known = client.get_experiment_by_name(EXPERIMENT)
        home = known.experiment_id if known else client.create_experiment(EXPERIMENT)
        run_id = client.create_run(home, run_name=config.run_name).info.run_id
        for name, value in asdict(config).items():
            client.log_param(run_id, name, value)
        return run_id

    def client(self):
        from mlflow import MlflowClient

        os.environ.update(self.environment)
        return MlflowClient(self.uri)

    def after_report(self, run_context, metrics: list[dict], checkpoint) -> None:
        if checkpoint is None:  # else these metrics were already reported
            step = metrics[0]["step"]
            for name, value in metrics[0].items():
                self.client().log_metric(self.run_id, name, value, step=step)

    def finish(self, status: str) -> None:
        """Close the run in the driver: "FINISHED", "FAILED" or "KILLED"."""
        self.client().set_terminated(self.run_id, status)
