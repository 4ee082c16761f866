"""MLflow, by its client alone (mlflow-skinny); a restarted run goes on as the same MLflow run."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.recipe_watching import Mlflow
from services.startup import StartupError
from services.tracking import identity

PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Training waits for each call; MLflow's own settings make that a quarter of an hour."""


class MlflowRun:
    """Metrics by step; samples and the recipe as artifacts."""

    name = "mlflow"

    def __init__(self, run_dir: Path, run_name: str, chosen: Mlflow, recipe: str):
        for key, value in PATIENCE.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        self.metric = Metric
        try:
            self.client = MlflowClient(tracking_uri=chosen.uri)
            run_id = identity.known(run_dir, self.name)
            if run_id is None:
                found = self.client.get_experiment_by_name(chosen.experiment)
                experiment = found.experiment_id if found else self.client.create_experiment(chosen.experiment)
                run_id = self.client.create_run(experiment, run_name=run_name).info.run_id
                self.client.log_text(run_id, recipe, "recipe.yaml")
            else:
                self.client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise StartupError(f"tracking.mlflow: {str(error).splitlines()[0]}") from error
        identity.remember(run_dir, self.name, run_id)
        self.run_id = run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(name.replace(".", "/"), value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.client.log_dict(self.run_id, {"samples": [dict(row) for row in rows]}, f"samples/step-{step}.json")

    def close(self) -> None:
        self.client.set_terminated(self.run_id)
