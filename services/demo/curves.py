"""The learning curves of the demo's arms side by side: a column for each arm, a thin line for each seed, their mean."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from services.demo.arms import ARMS, Arm

Steps = list[dict[str, Any]]
"""A run's lines of steps.jsonl."""

ROWS = (
    ("components.exact_match", "accuracy on\ntraining prompts, %", 100),
    ("components.self_certainty", "self-certainty,\nnats per token", 1),
    ("completion_length", "length, tokens", 1),
    ("kl", "KL to the base model,\nnats per token", 1),
)
"""Field of steps.jsonl, label, scale."""


def _values(steps: Steps, field: str, scale: float) -> list[float]:
    return [math.nan if row.get(field) is None else scale * row[field] for row in steps]


def plot(arms: Mapping[Arm, Sequence[Steps]], path: Path) -> Path:
    """As a PNG. A step without a value is a gap; the mean goes as far as the shortest run of its arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [arm for arm in ARMS if arms.get(arm)]
    figure = Figure(figsize=(1.2 + 2.1 * len(shown), 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ROWS), len(shown), sharex=True, sharey="row", squeeze=False)
    for (field, label, scale), line in zip(ROWS, panels, strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for arm, panel in zip(shown, line, strict=True):
            runs = [_values(steps, field, scale) for steps in arms[arm]]
            for steps, values in zip(arms[arm], runs, strict=True):
                panel.plot([row["step"] for row in steps], values, color="#2f6f9f", linewidth=0.7, alpha=0.45)
            if len(runs) > 1:
                mean = [fmean(values) for values in zip(*runs, strict=False)]
                panel.plot([row["step"] for row in arms[arm][0]][: len(mean)], mean, color="#c4572e", linewidth=1.8)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    for arm, first, last in zip(shown, panels[0], panels[-1], strict=True):
        first.set_title(arm, fontsize=10)
        last.set_xlabel("step", fontsize=9)
    figure.savefig(path, dpi=110)
    return path
