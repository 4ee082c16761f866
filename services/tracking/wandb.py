"""Weights & Biases, online or offline; a restarted run goes on as the same W&B run."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.recipe_watching import Wandb
from services.startup import StartupError
from services.tracking import identity

START_SECONDS = 90.0


class WeightsAndBiases:
    """Numbers are plotted over `step`: W&B's own counter refuses to go back, and a restored run does."""

    name = "wandb"

    def __init__(self, run_dir: Path, run_name: str, chosen: Wandb, settings: dict[str, Any]):
        import wandb

        self.wandb = wandb
        run_id = identity.known(run_dir, self.name) or secrets.token_hex(8)
        quiet = wandb.Settings(silent=True, console="off", init_timeout=START_SECONDS, disable_git=True)
        try:
            self.run = wandb.init(
                project=chosen.project,
                entity=chosen.entity,
                id=run_id,
                name=run_name,
                dir=str(run_dir),
                mode=chosen.mode,
                resume="allow" if chosen.mode == "online" else None,
                config=settings,
                settings=quiet,
            )
        except wandb.errors.Error as error:
            raise StartupError(f"tracking.wandb: {error} (mode: offline needs no network)") from error
        identity.remember(run_dir, self.name, run_id)
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log({"step": step, **{name.replace(".", "/"): value for name, value in numbers.items()}})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            head: list[str | int] = list(rows[0])
            table = self.wandb.Table(columns=head, data=[[row[str(key)] for key in head] for row in rows])
            self.run.log({"step": step, "samples": table})

    def close(self) -> None:
        self.run.finish()
