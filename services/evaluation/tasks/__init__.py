"""The benchmarks by name. A new one is a file here and a line below."""

from services.evaluation.benchmark import Benchmark
from services.evaluation.tasks import alpaca_eval, cruxeval_o, gsm8k, ifeval, livecodebench, math500, mmlu_pro

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (gsm8k, math500, livecodebench, cruxeval_o, mmlu_pro, ifeval, alpaca_eval)
}
