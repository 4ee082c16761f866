"""Specs that come with the server; every built-in reward is, besides, a spec of its own name."""

from services.spec import Combine, RewardSpec, RewardTerm

PRESETS = {
    # The paper's method: self-certainty alone.
    "intuitor": RewardSpec(rewards=[RewardTerm(name="self_certainty")]),
    "grpo": RewardSpec(rewards=[RewardTerm(name="math_verify")]),
    # Half and half after normalisation (the paper's appendix B.7).
    "intuitor_plus_accuracy": RewardSpec(
        rewards=[RewardTerm(name="self_certainty", weight=0.5), RewardTerm(name="math_verify", weight=0.5)]
    ),
    # What the open-r1 code computes: external rewards raw-summed, the sum normalised, self-certainty added 1:1.
    "open_r1_mix": RewardSpec(
        rewards=[
            RewardTerm(name="self_certainty"),
            RewardTerm(name="math_verify", bundle="external"),
            RewardTerm(name="format", bundle="external"),
        ],
        combine=Combine(order="normalize_then_sum", normalize="group_std", eps=1e-4),
    ),
    # Right and short above right and long above wrong; accuracy counts only through the length.
    "accuracy_cosine": RewardSpec(
        rewards=[RewardTerm(name="math_verify", weight=0.0), RewardTerm(name="cosine_length")]
    ),
    # Control arms (Spurious Rewards, arXiv 2506.10947), with accuracy measured beside them.
    "format_control": RewardSpec(rewards=[RewardTerm(name="format"), RewardTerm(name="math_verify", weight=0.0)]),
    "random_control": RewardSpec(rewards=[RewardTerm(name="random"), RewardTerm(name="math_verify", weight=0.0)]),
}
