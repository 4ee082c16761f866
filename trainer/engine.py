"""DeepSpeed: its configuration from a recipe, the engine, the learning rate."""

import logging
import math
import warnings
from typing import Any

import torch
from torch import nn

from services.recipe import Recipe, RecipeError, Trainer
from trainer.policy import Policy
from trainer.ranks import Ranks

log = logging.getLogger(__name__)


def check(recipe: Recipe) -> None:
    """Raises RecipeError for combinations that DeepSpeed would take and get wrong."""
    if recipe.model.dtype == "bfloat16" and recipe.trainer.zero_stage == 0:
        raise RecipeError(
            "trainer.zero_stage: 0 does not go with model.dtype bfloat16 (DeepSpeed's Adam then starts a step "
            "ahead); use zero_stage 1, 2 or 3, or model.dtype float32"
        )
    if recipe.model.lora is not None and recipe.trainer.kl_beta > 0 and recipe.trainer.reference.kind == "ema":
        raise RecipeError("trainer.reference.kind: ema does not go with model.lora, whose reference is the base model")
    offload, stage = recipe.trainer.offload, recipe.trainer.zero_stage
    if offload.optimizer and stage == 0:
        raise RecipeError("trainer.offload.optimizer: true needs trainer.zero_stage 1, 2 or 3 (it is 0)")
    if offload.parameters and stage != 3:
        raise RecipeError(f"trainer.offload.parameters: true needs trainer.zero_stage 3 (it is {stage})")


def config(recipe: Recipe, parameters: int, cuda: bool) -> dict[str, Any]:
    """The DeepSpeed configuration of the trained model, which has `parameters` elements to train."""
    trainer = recipe.trainer
    at_home = {"device": "cpu", "pin_memory": cuda}
    offload = {
        name: at_home
        for name, wanted in (
            ("offload_optimizer", trainer.offload.optimizer),
            ("offload_param", trainer.offload.parameters),
        )
        if wanted
    }
    return {
        # Batches are made here: every backward is one micro-batch whose loss is weighted over the whole step already.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "gradient_clipping": trainer.grad_clip,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Adam comes from torch: nothing to compile at the start.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": trainer.zero_stage,
            "overlap_comm": cuda,
            # Buffers of this many elements are made whatever the size of the model.
            "reduce_bucket_size": min(500_000_000, parameters),
            "stage3_param_persistence_threshold": min(100_000, parameters // 100),
            **offload,
        },
    }


def learning_rate(step: int, settings: Trainer) -> float:
    """For all updates of step `step` (from 0): linear warm-up, then the schedule down to 0 at `settings.steps`.

    The warm-up's first step already moves: with W warm-up steps, step k < W has (k + 1) / (W + 1) of the rate.
    """
    warmup = math.ceil(settings.warmup * settings.steps) if settings.warmup < 1 else int(settings.warmup)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, settings.steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[settings.schedule]
    return settings.learning_rate * max(0.0, factor)


def start(policy: Policy, recipe: Recipe, ranks: Ranks) -> Any:
    """The DeepSpeed engine that trains `policy`: a module called like it, with backward() and step().

    Raises RecipeError for offload where there is no GPU.
    """
    trainer, cuda = recipe.trainer, ranks.device.type == "cuda"
    if not cuda and (trainer.offload.optimizer or trainer.offload.parameters):
        raise RecipeError("trainer.offload: the ranks are on the CPU, there is nothing to offload to; leave it out")
    learned = [p for p in policy.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() >= 2]
    vectors = [p for p in learned if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": trainer.weight_decay},
        # Norms and biases are not decayed.
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=trainer.learning_rate,
        betas=trainer.betas,
        eps=trainer.adam_eps,
        fused=cuda,
    )
    _share_head(policy, recipe)
    settings = config(recipe, sum(p.numel() for p in learned), cuda)
    engine, *_ = _deepspeed().initialize(model=policy, optimizer=optimizer, config=settings)
    return engine


def start_frozen(policy: Policy, recipe: Recipe, ranks: Ranks) -> nn.Module:
    """The reference policy on its device; partitioned over the ranks where the trained one is."""
    if recipe.trainer.zero_stage < 3:
        return policy.to(ranks.device)
    _share_head(policy, recipe)
    cuda = ranks.device.type == "cuda"
    settings = config(recipe, sum(p.numel() for p in policy.parameters()), cuda)
    if recipe.trainer.reference.kind == "ema":
        # A weight that stayed whole between forwards would not be the one that its shares have become.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if recipe.trainer.reference.offload:
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    engine, *_ = _deepspeed().initialize(model=policy, config=settings)
    engine.eval()
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(engine: Any) -> float | None:
    """The norm before clipping, of the whole gradient over all ranks; none before ZeRO has stepped.

    Without ZeRO it must be asked for between the last backward and the step, with ZeRO after the step.
    """
    if engine.zero_optimization_stage() == 0:
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _share_head(policy: Policy, recipe: Recipe) -> None:
    """ZeRO stage 3 gathers a module's own weights for it; the tiled head uses the LM head's, so it must be told."""
    if recipe.trainer.zero_stage == 3:
        for parameter in policy.head_parameters:
            _deepspeed().zero.register_external_parameter(policy.head, parameter)


def _deepspeed() -> Any:
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Of DeepSpeed's own calls, at every collective.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Nothing is compatible, so nothing is compiled: with several CPU ranks DeepSpeed would otherwise build its
    # shared-memory collectives first (most of a minute, and it needs a C++ compiler); gloo does the same work.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
