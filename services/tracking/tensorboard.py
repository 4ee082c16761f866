"""TensorBoard event files in `tensorboard/` of the run's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class TensorBoard:
    """What earlier starts wrote of steps after `step` is purged: those are trained again."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.board.add_scalar(name.replace(".", "/"), value, step)
        self.board.flush()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """As a Markdown table on the Text tab."""
        if rows:
            head = list(rows[0])
            lines = [head, ["---"] * len(head), *([_cell(row[key]) for key in head] for row in rows)]
            self.board.add_text("samples", "\n".join("| " + " | ".join(line) + " |" for line in lines), step)

    def close(self) -> None:
        self.board.close()


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
