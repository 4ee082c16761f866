"""Whether a recipe's weights can be broadcast: between which GPUs, and to which engines."""

from services.recipe_sections import Model, Rollout, Scorer, Trainer, Weights


def check_broadcasts(weights: Weights, model: Model, trainer: Trainer, rollout: Rollout, scorer: Scorer) -> None:
    """Raises ValueError. What runs on servers that are given by their URLs is for those who start them to say."""
    transport = weights.transport
    if transport not in ("nccl", "ipc"):
        return
    if model.lora is not None:
        raise ValueError(
            f"weights.transport: {transport} is for whole weights, and those of model.lora are small files; use disk"
        )
    followers: dict[str, Rollout | Scorer] = {"rollout": rollout}
    if scorer.follow != "frozen":
        followers["scorer"] = scorer
    _check_devices(transport, trainer, followers)
    for part, settings in followers.items():
        if settings.engine != "vllm" and not settings.urls:
            raise ValueError(
                f"weights.transport: {transport} reaches engine vllm alone, and {part}.engine is {settings.engine}; "
                f"use {part}.engine: vllm, or transport: disk or delta"
            )
        if transport == "ipc" and (settings.replicas > 1 or settings.tensor_parallel_size > 1):
            raise ValueError(
                f"weights.transport: ipc stays within one GPU, and {part} has several; use one replica with "
                "tensor_parallel_size: 1, or transport: nccl"
            )
        if trainer.gpus is None or settings.gpus is None:
            continue
        first = trainer.gpus[0]
        if transport == "ipc" and first not in settings.gpus:
            raise ValueError(
                f"{part}.gpus: {settings.gpus} is not the trainer's first ({first}), which weights.transport: ipc needs"
            )
        if transport == "nccl" and first in settings.gpus:
            raise ValueError(
                f"{part}.gpus: {settings.gpus} holds the trainer's first ({first}), and NCCL takes no GPU twice; use "
                "another one, or weights.transport: ipc"
            )
    if transport == "nccl" and "scorer" in followers and (both := set(rollout.gpus or []) & set(scorer.gpus or [])):
        raise ValueError(
            f"scorer.gpus: {sorted(both)} are rollout.gpus, too, and NCCL takes no GPU twice; use others, or "
            "weights.transport: disk or delta"
        )


def _check_devices(transport: str, trainer: Trainer, followers: dict[str, Rollout | Scorer]) -> None:
    for part, device in {"trainer": trainer.device, **{name: part.device for name, part in followers.items()}}.items():
        if device == "cpu":
            raise ValueError(
                f"weights.transport: {transport} needs GPUs, and {part}.device is cpu; use transport: disk or delta"
            )
