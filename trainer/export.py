"""A run's weights as a Hugging Face model folder, from the run's files alone; back into a run; and to the hub."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from services import recipe as recipes
from services.contract import Version, WeightVersion
from services.model_folder import model_folder
from services.recipe import Model, Recipe, RecipeError
from services.startup import StartupError
from services.steps import StepsError, read_steps
from services.weights import disk
from services.weights.mirror import version_at, whole
from services.weights.store import MANIFEST, store_at
from trainer import card, checkpoint, pieces
from trainer import policy as policies
from trainer.checkpoint import Progress

log = logging.getLogger(__name__)

ABOUT = "rlif.json"
FOLDER = re.compile(r"^(\d+)-(\d+)$")


def export(run_dir: Path, out_dir: Path, best: bool = False) -> Version:
    """Write the newest weights of the run in `run_dir` to the new folder `out_dir`, and return their version.

    Takes the newest published version, or the newest checkpoint where that is newer or what was published is damaged;
    with `best`, the checkpoint that evaluation found to be the best. Beside the weights: a model card (README.md), and
    `rlif.json`, from which a run can go on (`begin_from`). Raises RecipeError: no such weights there, or `out_dir` is
    not empty.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise RecipeError(f"{out_dir} is not empty; choose a new folder")
    base = _base(run_dir)
    published = None if best else _published(_weights_dir(run_dir), base)
    saved = _best(run_dir / "checkpoints") if best else _newest(run_dir / "checkpoints", checkpoint.sound)
    if published is None and saved is None:
        raise RecipeError(f"{run_dir} holds neither published weights nor a checkpoint")
    aside = out_dir.with_name(f".{out_dir.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if saved is None or (published is not None and published[0] >= saved[0]):
        assert published is not None
        version, weights = published
        with whole(weights, base) as model:
            shutil.copytree(model, aside, ignore=shutil.ignore_patterns(MANIFEST, ABOUT, "README.md"))
    else:
        version, folder = saved
        aside.mkdir(parents=True)
        manifest = disk.write_tensors(aside, _tensors(folder))
        disk.copy_config(run_dir / "model", aside, manifest)
    trained = trained_groups(run_dir, version.version)
    about = {"run": _run_name(run_dir), "lineage": version.lineage, "step": version.version, "trained": trained}
    (aside / ABOUT).write_text(json.dumps(about))
    (aside / "README.md").write_text(card.write(run_dir, version))
    if out_dir.exists():
        out_dir.rmdir()
    aside.rename(out_dir)
    return version


def push(run_dir: Path, repository: str, private: bool, best: bool = False) -> str:
    """Export the run and upload it to the Hugging Face hub (HF_ENDPOINT) as `repository`; returns its URL.

    The token is HF_TOKEN. Raises RecipeError as `export` does, and StartupError: no token, or the hub refuses.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise StartupError("HF_TOKEN: is not set; the hub takes a model only from whom it knows")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".push-") as folder:
        version = export(run_dir, Path(folder) / "model", best)
        try:
            url = api.create_repo(repository, private=private, exist_ok=True)
            message = f"rlif: weights {version}"
            api.upload_folder(repo_id=url.repo_id, folder_path=Path(folder) / "model", commit_message=message)
        except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
            reason = " ".join(str(error).split())
            raise StartupError(f"{repository}: the hub at {api.endpoint} did not take it: {reason}") from error
    return str(url)


def begin_from(folder: Path, recipe: Recipe) -> Progress:
    """Where a run stands that goes on from a model folder: at the step that its `rlif.json` names where the folder is
    this run's own, else at 0. Raises RecipeError: no model there, or one of another shape than `model.path`."""
    from transformers import AutoConfig

    try:
        trust = recipe.model.trust_remote_code
        base = AutoConfig.from_pretrained(recipe.model.path, revision=recipe.model.revision, trust_remote_code=trust)
        given = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # a broken configuration raises from several unrelated trees
        raise RecipeError(f"--resume-from: {folder} is not a model folder: {error}") from error
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"):
        here, there = getattr(base, key, None), getattr(given, key, None)
        if here != there:
            raise RecipeError(
                f"--resume-from: {folder} has {key} {there!r}, model.path {recipe.model.path} has {here!r}"
            )
    about = _about(folder)
    if about.get("run") != recipe.run.name or not about.get("trained"):
        log.info("%s says nothing of the steps of run %s: it begins at step 0", folder, recipe.run.name)
        return Progress(lineage=-1)
    return Progress(step=about["step"], lineage=about["lineage"])


def trained_before(folder: Path) -> list[str]:
    """The groups (ids) whose effect the weights of an exported folder hold."""
    return _about(folder).get("trained", [])


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise RecipeError(f"--resume-from: {path} cannot be read: {error}") from error


def trained_groups(run_dir: Path, step: int) -> list[str]:
    """The groups (ids) of the first `step` steps, from the audit trail."""
    if step == 0:
        return []
    return [group_id for row in _rows(run_dir) if row["step"] <= step for group_id in row["group_ids"]]


def trained_later(run_dir: Path, step: int) -> list[str]:
    """The groups (ids) of the steps after `step`."""
    steps = run_dir / "steps.jsonl"
    if not steps.exists() or not steps.stat().st_size:
        return []
    return [group_id for row in _rows(run_dir) if row["step"] > step for group_id in row["group_ids"]]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_steps(run_dir / "steps.jsonl")
    except StepsError as error:
        log.warning("only redis knows which groups were trained: %s", error)
        return []


def _run_name(run_dir: Path) -> str | None:
    path = run_dir / "recipe.yaml"
    return recipes.load(path).run.name if path.exists() else None


def _weights_dir(run_dir: Path) -> Path | str:
    """Where the recipe put the weights, when the run's folder has the recipe; in that folder, wherever it is now,
    unless the recipe says otherwise."""
    path = run_dir / "recipe.yaml"
    chosen = recipes.load(path).weights.dir if path.exists() else None
    return chosen or run_dir / "weights"


def _best(directory: Path) -> tuple[Version, Path]:
    folder = checkpoint.best_folder(directory)
    if folder is None:
        raise RecipeError(
            f"{directory.parent} has no best checkpoint: the recipe had no `evaluation`, none is done yet, or it is "
            "damaged; without --best the newest weights are taken"
        )
    lineage, _, step = folder.name.partition("-")
    return Version(lineage=int(lineage), version=int(step)), folder


def _newest(directory: Path, sound: Callable[[Path], bool]) -> tuple[Version, Path] | None:
    found = []
    for path in directory.iterdir() if directory.is_dir() else []:
        if match := FOLDER.match(path.name):
            found.append((Version(lineage=int(match[1]), version=int(match[2])), path))
    return next((item for item in sorted(found, reverse=True) if sound(item[1])), None)


def _published(place: Path | str, base: Callable[[], Path] | None) -> tuple[Version, WeightVersion] | None:
    """The newest published version that is sound. Raises StartupError: the client of a bucket is not installed."""
    store = store_at(place)
    try:
        found = store.versions()
    except OSError as error:
        log.warning("what was published cannot be looked at: %s", error)
        return None
    for version, files in reversed(found):
        location = store.location(f"{version.lineage}-{version.version}")
        if MANIFEST in files:
            try:
                weights = version_at(location)
                with whole(weights, base):
                    return version, weights
            except (OSError, ValueError, StartupError) as error:
                log.warning("%s is passed over: %s", location, error)
    return None


def _base(run_dir: Path) -> Callable[[], Path] | None:
    """What gives the folder of the model that a run's adapters are added to."""
    path = run_dir / "recipe.yaml"
    if not path.exists():
        return None
    model = recipes.load(path).model
    return partial(model_folder, model.path, model.revision)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights out of a checkpoint, under their Hugging Face names, in the model's dtype."""
    saved, about = pieces.Pieces(checkpoint.rank_folders(folder)), checkpoint.state(folder)
    dtype = getattr(torch, about["identity"]["model.dtype"])
    if (adapters := about["identity"].get("model.lora")) is not None:
        # A checkpoint holds what is trained: the adapters. They are put into the model that they stand on.
        model = Model(path=about["identity"]["model.path"], dtype=about["identity"]["model.dtype"], lora=adapters)
        policy = policies.load(model)
        parameters = dict(policy.named_parameters())
        for name, shape in about["shapes"].items():
            parameters[name].data.copy_(saved.whole(name, shape))
        yield from policies.tensors(policy, partitioned=False, adapters=model.lora)
        return
    for name, shape in about["shapes"].items():
        yield name.removeprefix("model."), saved.whole(name, shape).to(dtype)
    for name in saved.names(pieces.BUFFER):
        yield name.removeprefix("model."), saved.one(pieces.BUFFER, name)
