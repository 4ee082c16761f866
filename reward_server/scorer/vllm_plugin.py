"""What the scorer changes inside vLLM, in every one of its processes (a `vllm.general_plugins` entry point).

It acts only in processes that `reward_server.scorer.vllm` started (RLIF_VLLM_SCORER is set), and may be called
repeatedly. Only names are registered here; vLLM imports the model itself where it builds one.
"""

import os

from services.vllm_process import end_with_parent, keep_weights_unpacked, know_broadcasts

SWITCH = "RLIF_VLLM_SCORER"
PLUGIN = "rlif_scorer"
"""Its name among the `vllm.general_plugins` entry points."""

ARCHITECTURES = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
"""Causal language models that can be scored, by the name in their config.json."""


def scorer_of(architecture: str) -> str:
    """The name under which vLLM knows the scoring variant of a causal language model."""
    return f"{architecture}Scorer"


def register() -> None:
    """Called by vLLM before it builds a model, in the API process, the engine core and every worker."""
    if os.environ.get(SWITCH) != "1":
        return
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        keep_weights_unpacked()
    for architecture in ARCHITECTURES:
        name = scorer_of(architecture)
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"reward_server.scorer.vllm_model:{name}")
    know_broadcasts()
    end_with_parent()
