"""What the scoring variant of each architecture makes of some sequences: a line of JSON for each folder.

    python tests/vllm_families.py ITEMS.json FOLDER...

A program of its own, because engine core and model run in this process, one folder after another, which leaves marks on
it (vLLM patches transformers' own models for those that it has not written itself).
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from reward_server.scorer import vllm_plugin
from reward_server.scorer.items import TokenItem, collect
from reward_server.scorer.vllm import VllmModel, VllmSettings, pooling_params, rows_of


def main() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.engine.llm_engine import LLMEngine

    from reward_server.scorer import vllm_model

    for architecture in vllm_plugin.ARCHITECTURES:
        # By class: vLLM looks at a class that it knows by name alone in a process of its own, for seconds each.
        name = vllm_plugin.scorer_of(architecture)
        ModelRegistry.register_model(name, getattr(vllm_model, name))
    items = [TokenItem(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    for folder in sys.argv[2:]:
        settings = VllmSettings(Path(folder), folder, "float32", "cpu", 1, max_model_len=512, max_batch_tokens=64)
        model = VllmModel(settings)
        engine = LLMEngine.from_engine_args(model.args)
        engine.collective_rpc("check_scorer_head")
        asked = [rows_of(item, len(item.completion_ids), model.vocab_size) for item in items]
        for number, (item, (rows, _)) in enumerate(zip(items, asked, strict=True)):
            ids = [*item.prompt_ids, *item.completion_ids]
            engine.add_request(str(number), {"prompt_token_ids": ids}, pooling_params(rows))
        results, cached = {}, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                number = int(output.request_id)
                rows, span = asked[number]
                statistics = rows.statistics(output.outputs.data, model.vocab_size)
                scores = collect(items[number], statistics, span)
                results[number] = {name: values.tolist() for name, values in scores.per_token.items()}
                cached += output.num_cached_tokens
        found = {"folder": folder, "results": [results[n] for n in range(len(items))], "cached": cached}
        sys.stdout.write(json.dumps(found) + "\n")
        del engine


if __name__ == "__main__":
    main()
