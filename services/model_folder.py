"""A model's files on this machine, and how transformers is to run it."""

import os
from pathlib import Path
from typing import Any

from services.startup import StartupError

HUB_SECONDS = 10.0


def check_local(model: str, key: str = "--model") -> Path | None:
    """The folder that `model` names on this machine; none when it is a name for the hub. Raises StartupError, which
    begins with `key`: there is no such folder, or it is not a model's."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise StartupError(f"{key} {model}: the folder has no config.json, so it is not a Hugging Face model")
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise StartupError(f"{key} {model}: no such folder")
    return None


def check_available(model: str, revision: str | None, key: str) -> None:
    """Before anything is started for it, and without the many attempts of a download. Raises StartupError, which begins
    with `key`: the model is no folder here, was never downloaded, and the hub does not have it or does not answer."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if check_local(model, key):
        return
    try:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return
        HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS)
    except Exception as error:  # the hub client raises from half a dozen unrelated trees
        raise StartupError(f"{key} {model}: neither a folder here nor to be had from the hub: {_why(error)}") from error


def _why(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quiet_hub() -> None:
    """For a command that tells how asking the hub ended: its client, imported later, tells of every attempt."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def model_folder(model: str, revision: str | None) -> Path:
    """The local folder of a model, fetched from the Hugging Face hub if `model` is a name. Raises StartupError."""
    if folder := check_local(model):
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises from half a dozen unrelated trees
        raise StartupError(
            f"--model {model}: neither a folder here nor to be had from the hub: {_why(error)}"
        ) from error


def attention_for(config: Any, wanted: str = "sdpa") -> str:
    """The attention implementation to load a model of `config` (a transformers PreTrainedConfig) with.

    PyTorch's scaled_dot_product_attention has no cap on attention scores, and transformers leaves the cap out without a
    word when it is asked for (Gemma 2: `attn_logit_softcapping`); such a model needs "eager".
    """
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if is_capped and wanted == "sdpa" else wanted
