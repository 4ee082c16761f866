"""What arXiv 2505.19590 reports: tables 1, 4, 5 and 6, in percent. Columns as `Benchmark.column` names them."""

from dataclasses import dataclass

COLUMNS = ("GSM8K", "MATH500", "LCB", "CRUXEval-O", "MMLU-Pro", "AlpacaEval")
SOURCE = "arXiv 2505.19590"


@dataclass(frozen=True)
class Row:
    """`family` groups a base model with what was trained from it; `values` run parallel to `COLUMNS`."""

    family: str
    name: str
    table: int
    values: tuple[float, float, float, float, float, float]

    def value(self, column: str) -> float:
        return self.values[COLUMNS.index(column)]


ROWS = (
    Row("1.5b", "Qwen2.5-1.5B base", 1, (0.2, 9.0, 0.0, 0.0, 29.7, 2.10)),
    Row("1.5b", "+ GRPO", 1, (74.7, 56.0, 5.6, 32.8, 31.5, 4.03)),
    Row("1.5b", "+ Intuitor", 1, (71.1, 53.0, 9.9, 29.6, 31.0, 4.28)),
    Row("3b", "Qwen2.5-3B base", 1, (67.3, 54.4, 9.3, 23.6, 37.7, 3.72)),
    Row("3b", "+ GRPO", 1, (82.6, 63.6, 8.5, 34.1, 40.3, 6.91)),
    Row("3b", "+ GRPO-PV", 1, (82.0, 63.6, 8.6, 29.9, 39.8, 6.17)),
    Row("3b", "+ Intuitor", 1, (79.2, 61.2, 15.3, 41.6, 37.9, 7.10)),
    Row("3b", "+ Intuitor-Code", 1, (74.3, 57.2, 15.3, 41.1, 38.6, 4.16)),
    Row("7b", "Qwen2.5-7B base", 4, (55.3, 63.6, 2.6, 17.8, 49.7, 4.46)),
    Row("7b", "+ GRPO", 4, (82.9, 75.0, 20.0, 53.8, 51.1, 8.52)),
    Row("7b", "+ Intuitor", 4, (87.3, 75.0, 19.0, 57.4, 51.4, 12.76)),
    Row("14b", "Qwen2.5-14B base", 4, (75.1, 67.4, 22.0, 49.1, 56.5, 8.51)),
    Row("14b", "+ GRPO", 4, (91.7, 75.8, 29.6, 52.0, 57.8, 17.53)),
    Row("14b", "+ Intuitor", 4, (92.3, 77.0, 30.0, 56.0, 58.3, 20.57)),
    Row("qwen3-14b", "Qwen3-14B base", 4, (48.0, 79.4, 35.8, 66.3, 59.7, 29.22)),
    Row("qwen3-14b", "+ Intuitor", 4, (86.4, 83.4, 35.6, 67.7, 61.3, 40.11)),
    Row("llama-3b", "Llama-3.2-3B-Instruct", 5, (68.8, 43.6, 10.6, 26.5, 34.0, 11.07)),
    Row("llama-3b", "+ GRPO", 5, (71.4, 49.4, 12.7, 26.6, 36.1, 13.62)),
    Row("llama-3b", "+ Intuitor", 5, (72.3, 47.6, 13.4, 29.3, 35.8, 12.41)),
    Row("olmo-7b", "OLMo-2-7B-SFT", 6, (69.1, 30.2, 2.3, 23.8, 29.5, 6.51)),
    Row("olmo-7b", "+ GRPO", 6, (71.0, 37.4, 2.8, 21.8, 29.6, 7.38)),
    Row("olmo-7b", "+ Intuitor", 6, (71.0, 37.2, 2.8, 21.5, 29.1, 7.60)),
)
FAMILIES = tuple(dict.fromkeys(row.family for row in ROWS))
