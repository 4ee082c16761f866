"""`rlif serve reward`, `rlif serve rollout` and `rlif serve sandbox`: one server process."""

import os
import socket
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import ValidationError

from services import recipe
from services.cli.watch import watch
from services.model_folder import check_local
from services.spec import RewardSpec
from services.startup import StartupError
from services.weights import store
from services.weights.meeting import TRANSPORTS

app = typer.Typer(no_args_is_help=True, help="Start one server.")

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")

Host = Annotated[str, typer.Option(help="Address to bind; beyond loopback RLIF_API_TOKEN must be set.")]
Port = Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="Take every setting from this recipe and follow its run's weights.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of --recipe: key.sub=value")]
NoFollow = Annotated[
    bool, typer.Option("--no-follow", help="With --recipe: serve its model as it is, whatever its run has published.")
]
ModelName = Annotated[str | None, typer.Option("--model", help="Hugging Face name or local folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
SANDBOXES = (
    "Where programs in completions are run: none, bubblewrap, http://HOST:PORT (rlif serve sandbox), "
    "sandboxfusion=URL, piston=URL or e2b."
)
Follow = Annotated[
    str | None, typer.Option(help="Redis URL of a run whose weight versions this server follows (with --run).")
]
RunName = Annotated[str | None, typer.Option("--run", help="Name of the run to follow.")]


def _check_follow(follow: str | None, run: str | None) -> None:
    if (follow is None) != (run is None):
        raise StartupError("--follow and --run belong together: give both or neither")


def _check_choice(option: str, given: str, valid: tuple[str, ...]) -> None:
    if given not in valid:
        raise StartupError(f"{option} {given}: choose {', '.join(valid[:-1])} or {valid[-1]}")


def _load(recipe_file: Path | None, overrides: list[str] | None, no_follow: bool) -> recipe.Recipe | None:
    if recipe_file is None and no_follow:
        raise StartupError(
            "--no-follow: is for the run of a --recipe; without one, only --follow makes a server follow"
        )
    if recipe_file is None and overrides:
        raise StartupError(f"{overrides[0]!r}: overrides are of a recipe; name it with --recipe")
    return recipe.load(recipe_file, overrides) if recipe_file else None


def read_spec(path: Path) -> RewardSpec:
    """Raises StartupError naming the file and the field."""
    try:
        return RewardSpec.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise StartupError(f"--spec {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StartupError(f"--spec {path} is not YAML: {error}") from error
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'spec'}: {e['msg']}" for e in error.errors(include_url=False)]
        raise StartupError(f"--spec {path}: " + "; ".join(faults)) from error


def _limit_threads(threads: int | None) -> None:
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def replica_name(service: str, port: int) -> str:
    return f"{service}-{socket.gethostname()}-{port}"


@app.command()
def reward(
    overrides: Overrides = None,
    model: ModelName = None,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    reference_model: Annotated[
        str | None, typer.Option(help="Frozen model that --model is compared with, for kl_to_reference (transformers).")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="YAML reward spec that becomes the default.")] = None,
    port: Port = 8100,
    host: Host = "127.0.0.1",
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads of the scorer.", min=1)] = None,
    verifier_workers: Annotated[int, typer.Option(help="Processes that check math.", min=1)] = 2,
    sandbox: Annotated[str, typer.Option(help=SANDBOXES)] = "none",
    own_rewards: Annotated[
        list[str] | None, typer.Option("--reward", help="A reward of your own, as module:function; may be repeated.")
    ] = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Padded tokens of one scoring batch.", min=1)] = 16384,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and completion together (vllm).", min=2)
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs of one vLLM engine.", min=1)] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of GPU memory vLLM may take.")] = 0.85,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    follow: Follow = None,
    run: RunName = None,
    match: Annotated[
        bool, typer.Option("--match", help="With --follow: a group waits for the weight version that it asks for.")
    ] = False,
    recipe_file: RecipeFile = None,
    no_follow: NoFollow = False,
) -> None:
    """Score completions over HTTP: self-certainty by a scorer model, verifiable rewards, and mixes of them.

    Without --model it serves the rewards that need none.
    """
    watch("reward")
    _check_follow(follow, run)
    _check_choice("--device", device, DEVICES)
    _check_choice("--dtype", dtype, DTYPES)
    _check_choice("--engine", engine, ("transformers", "vllm"))
    if match and follow is None:
        raise StartupError("--match: there are no weights to wait for without --follow and --run")
    if engine == "vllm" and model is None and recipe_file is None:
        raise StartupError("--engine vllm: give the model that it is to score with, --model")
    chosen = _load(recipe_file, overrides, no_follow)
    if chosen:
        store.require(chosen.weights_dir)
    _limit_threads(chosen.scorer.threads if chosen else threads)
    if served := chosen.model.path if chosen else model:
        check_local(served, "model.path" if chosen else "--model")  # sooner than importing torch takes
    from reward_server import app as reward_app
    from services.access import settings_from_environment
    from services.http import serve

    if chosen:
        settings = reward_app.Settings(
            http=settings_from_environment(host),
            model=chosen.model.path,
            revision=chosen.model.revision,
            reference_model=chosen.scorer.reference_model,
            dtype=chosen.model.dtype,
            device=chosen.scorer.device,
            threads=chosen.scorer.threads,
            trust_remote_code=chosen.model.trust_remote_code,
            default_spec=chosen.spec or str(chosen.rewards),
            follow=chosen.scorer.follow,
            ema_decay=chosen.scorer.ema_decay,
            deterministic=chosen.run.deterministic,
            redis_url=None if no_follow else recipe.redis_url(chosen),
            run_id=None if no_follow else chosen.run.name,
            replica=replica_name("reward", port),
            poll_seconds=chosen.weights.poll_seconds,
            mirror_dir=chosen.weights.mirror_dir,
            broadcasts=chosen.weights.transport in TRANSPORTS,
            engine=chosen.scorer.engine,
            max_batch_tokens=chosen.scorer.max_batch_tokens,
            max_model_len=chosen.scorer.max_model_len,
            tensor_parallel_size=chosen.scorer.tensor_parallel_size,
            gpu_memory_utilization=chosen.scorer.gpu_memory_utilization,
            verifier_workers=chosen.scorer.verifier_workers,
            plugins=(*chosen.scorer.plugins, *(own_rewards or ())),
            sandbox=chosen.scorer.sandbox,
        )
    else:
        settings = reward_app.Settings(
            http=settings_from_environment(host),
            model=model,
            reference_model=reference_model,
            dtype=dtype,
            device=device,
            threads=threads,
            trust_remote_code=trust_remote_code,
            default_spec=read_spec(spec) if spec else None,
            follow="match" if match else "online",
            redis_url=follow,
            run_id=run,
            replica=replica_name("reward", port),
            engine=engine,
            max_batch_tokens=max_batch_tokens,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            verifier_workers=verifier_workers,
            plugins=tuple(own_rewards or ()),
            sandbox=sandbox,
        )
    serve(reward_app.create(settings), host, port)


@app.command()
def rollout(
    overrides: Overrides = None,
    model: ModelName = None,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    port: Port = 8200,
    host: Host = "127.0.0.1",
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.", min=1)] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and completion together.", min=2)] = None,
    max_batch_sequences: Annotated[int, typer.Option(help="Sequences generated together.", min=1)] = 256,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs of one vLLM engine.", min=1)] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of GPU memory vLLM may take.")] = 0.85,
    served_model_name: Annotated[str | None, typer.Option(help="Model name in the OpenAI routes.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    nodes: Annotated[int, typer.Option(help="Nodes that one vLLM engine spans; each runs this command.", min=1)] = 1,
    node_rank: Annotated[int, typer.Option(help="This node's number; 0 serves, the others work for it.", min=0)] = 0,
    leader: Annotated[str, typer.Option(help="Host of node 0, as the other nodes reach it.")] = "127.0.0.1",
    follow: Follow = None,
    run: RunName = None,
    recipe_file: RecipeFile = None,
    no_follow: NoFollow = False,
) -> None:
    """Generate groups of completions over HTTP, with token ids and logprobs; OpenAI routes beside them."""
    watch("rollout")
    _check_follow(follow, run)
    _check_choice("--device", device, DEVICES)
    _check_choice("--dtype", dtype, DTYPES)
    chosen = _load(recipe_file, overrides, no_follow)
    if chosen:
        store.require(chosen.weights_dir)
    if chosen is None and model is None:
        raise StartupError("--model: give a Hugging Face name or a local folder (or --recipe)")
    _check_choice("--engine", engine, ("transformers", "vllm"))
    if chosen and nodes > 1 and _is_mirrored(chosen) and chosen.weights.mirror_dir is None:
        raise StartupError(
            "weights.mirror_dir: with transport: delta, model.lora or a bucket, and an engine over several nodes, name "
            "a folder that all of them see at the same path"
        )
    _limit_threads(chosen.rollout.threads if chosen else threads)
    check_local(chosen.model.path if chosen else str(model), "model.path" if chosen else "--model")
    from rollout_server import app as rollout_app
    from services.access import settings_from_environment
    from services.http import serve

    if chosen:
        settings = rollout_app.Settings(
            http=settings_from_environment(host),
            model=chosen.model.path,
            revision=chosen.model.revision,
            dtype=chosen.model.dtype,
            device=chosen.rollout.device,
            threads=chosen.rollout.threads,
            engine=chosen.rollout.engine,
            max_model_len=chosen.rollout.max_model_len,
            max_batch_sequences=chosen.rollout.max_batch_sequences,
            tensor_parallel_size=chosen.rollout.tensor_parallel_size,
            gpu_memory_utilization=chosen.rollout.gpu_memory_utilization,
            trust_remote_code=chosen.model.trust_remote_code,
            served_model_name=served_model_name,
            redis_url=None if no_follow else recipe.redis_url(chosen),
            run_id=None if no_follow else chosen.run.name,
            replica=replica_name("rollout", port),
            poll_seconds=chosen.weights.poll_seconds,
            mirror_dir=chosen.weights.mirror_dir,
            broadcasts=chosen.weights.transport in TRANSPORTS,
            in_flight=chosen.weights.in_flight,
            nodes=nodes,
            node_rank=node_rank,
            leader=leader,
        )
    else:
        assert model is not None
        settings = rollout_app.Settings(
            http=settings_from_environment(host),
            model=model,
            dtype=dtype,
            device=device,
            threads=threads,
            engine=engine,
            max_model_len=max_model_len,
            max_batch_sequences=max_batch_sequences,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            trust_remote_code=trust_remote_code,
            served_model_name=served_model_name,
            redis_url=follow,
            run_id=run,
            replica=replica_name("rollout", port),
            nodes=nodes,
            node_rank=node_rank,
            leader=leader,
        )
    if node_rank > 0:
        chosen_engine = rollout_app.engine_settings(settings)
        from rollout_server.engines.vllm_node import work

        raise typer.Exit(work(chosen_engine, port))
    serve(rollout_app.create(settings), host, port)


@app.command()
def sandbox(
    languages: Annotated[
        str | None, typer.Option(help="What programs may be written in: python,cpp. Left out: all that is installed.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Cases run at once; left out: one a CPU.", min=1)] = None,
    queue: Annotated[int, typer.Option(help="Programs that may wait; more are answered 429.", min=1)] = 4096,
    port: Port = 8400,
    host: Host = "127.0.0.1",
) -> None:
    """Run untrusted programs for reward servers (their --sandbox http://HOST:PORT), each in namespaces of its own."""
    watch("sandbox")
    from reward_server.sandbox import app as sandbox_app
    from reward_server.sandbox.bubblewrap import TOOLS, Bubblewrap
    from services.access import settings_from_environment
    from services.http import serve

    wanted = frozenset(languages.split(",")) if languages else frozenset()
    for language in sorted(wanted - set(TOOLS)):
        raise StartupError(f"--languages {language}: choose from {', '.join(TOOLS)}")
    bubblewrap = Bubblewrap(wanted, concurrency, queue)
    serve(sandbox_app.create(settings_from_environment(host), bubblewrap), host, port)


def _is_mirrored(chosen: recipe.Recipe) -> bool:
    """Whether servers keep a copy of the weights in `weights.mirror_dir`."""
    weights = chosen.weights
    return weights.transport == "delta" or chosen.model.lora is not None or store.is_url(chosen.weights_dir)
