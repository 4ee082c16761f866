"""What the vLLM engine changes inside vLLM, in every one of its processes (a `vllm.general_plugins` entry point).

It acts only in processes that `rollout_server.engines.vllm` started (RLIF_VLLM is set), and may be called repeatedly.
"""

import os
from typing import Any

from services.vllm_process import end_with_parent, keep_weights_unpacked, know_broadcasts

SWITCH = "RLIF_VLLM"
PLUGIN = "rlif"
"""Its name among the `vllm.general_plugins` entry points."""


def register() -> None:
    """Called by vLLM before it builds a model, in the API process, the engine core and every worker."""
    if os.environ.get(SWITCH) != "1":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        keep_weights_unpacked()
    report_logprobs_before_filters()
    know_broadcasts()
    end_with_parent()


def report_logprobs_before_filters() -> None:
    """vLLM's `processed_logprobs` are taken after temperature, top-k and top-p; `raw_logprobs` before all three. The
    behaviour policy's are those at the sampling temperature before the filters: take them there."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    for name in ("forward_native", "forward_cpu"):
        original = getattr(TopKTopPSampler, name)
        if original.__module__ != __name__:
            setattr(TopKTopPSampler, name, _with_unfiltered_logprobs(original))

    from vllm.v1.worker.gpu.sample.sampler import Sampler

    sampler: Any = Sampler
    if sampler._sample_random.__module__ != __name__:
        sampler._sample_random = _with_unfiltered_logits(sampler._sample_random)


def _with_unfiltered_logprobs(original):
    def forward(self, logits, generators, k, p):
        if self.logprobs_mode != "processed_logprobs" or (k is None and p is None):
            return original(self, logits, generators, k, p)
        import torch

        # Before the call, because it filters the logits in place.
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        sampled, _ = original(self, logits, generators, k, p)
        return sampled, logprobs

    return forward


def _with_unfiltered_logits(original):
    def sample(self, processed_logits, expanded_idx_mapping, idx_mapping_np, pos, top_k, top_p, use_fused_sampler):
        is_filtered = top_k is not None or top_p is not None
        unfiltered = processed_logits.clone() if is_filtered and not use_fused_sampler else processed_logits
        sampled, returned = original(
            self, processed_logits, expanded_idx_mapping, idx_mapping_np, pos, top_k, top_p, use_fused_sampler
        )
        return sampled, unfiltered if is_filtered else returned

    return sample
