"""One YAML recipe -> typed settings. Every service reads its own section; a bad key or value is refused by name."""

import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import ValidationError, field_validator, model_validator

from services.algorithms import default_combine
from services.recipe_broadcasts import check_broadcasts
from services.recipe_sections import (
    REDIS_SCHEMES,
    Data,
    Model,
    Pacing,
    Queue,
    Rollout,
    Run,
    Scorer,
    Trainer,
    Weights,
    of_scheme,
)
from services.recipe_watching import Evaluation, Guard, Tracking
from services.section import Section
from services.spec import Combine, RewardSpec, RewardTerm


class RecipeError(ValueError):
    """A recipe that cannot run; the message names key, value and what would be valid, a line for each fault."""


class Recipe(Section):
    run: Run
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    rewards: str | list[RewardTerm]
    """A list of terms, or the name of a preset (`intuitor`, `grpo`, ...) or of one built-in reward."""
    combine: Combine | None = None
    scorer: Scorer = Scorer()
    pacing: Pacing = Pacing()
    trainer: Trainer
    weights: Weights = Weights()
    queue: Queue = Queue()
    tracking: Tracking = Tracking()
    evaluation: Evaluation | None = None
    guard: Guard | None = Guard()

    @field_validator("rewards")
    @classmethod
    def spec_is_sound(cls, rewards: str | list[RewardTerm]) -> str | list[RewardTerm]:
        if isinstance(rewards, list):
            if not rewards:
                raise ValueError("list at least one reward")
            RewardSpec(rewards=rewards)
        return rewards

    @model_validator(mode="after")
    def parts_agree(self) -> Self:
        if self.combine is not None and isinstance(self.rewards, str):
            raise ValueError(
                f"combine: the spec {self.rewards!r} brings its own; set combine=null, or list the rewards to "
                "combine them anew"
            )
        if isinstance(self.rewards, list) and not any(
            term.weight and (term.sources is None or self.data.names_sources or self.data.source in term.sources)
            for term in self.rewards
        ):
            raise ValueError(
                f"rewards: none has a weight other than 0 for tasks of data.source {self.data.source!r}: "
                "there is nothing to train on"
            )
        if self.trainer.groups_per_step % self.rollout.groups_per_request:
            raise ValueError(
                f"rollout.groups_per_request: {self.rollout.groups_per_request} does not divide "
                f"trainer.groups_per_step ({self.trainer.groups_per_step})"
            )
        if self.rollout.group_size == 1 and not isinstance(self.rewards, str):
            if self.combined.normalize != "none":
                raise ValueError(
                    "rollout.group_size: 1 leaves nothing to normalise in; use at least 2, or normalize: none"
                )
        needed = {
            "rollout": self.rollout.replicas * self.rollout.tensor_parallel_size,
            "scorer": self.scorer.replicas * self.scorer.tensor_parallel_size,
            "trainer": self.trainer.ranks,
        }
        for part, count in needed.items():
            gpus = getattr(self, part).gpus
            if gpus is not None and len(set(gpus)) != count:
                raise ValueError(f"{part}.gpus: {gpus} must be {count} different devices, one for each replica or rank")
        if self.model.lora is not None and self.trainer.reference.kind == "ema":
            raise ValueError("trainer.reference.kind: ema is of whole weights; with model.lora the reference is frozen")
        if self.rollout.sampling.temperature == 0:
            raise ValueError("rollout.sampling.temperature: 0 makes every completion of a group the same; use e.g. 1.0")
        if self.run.deterministic and self.scorer.engine == "vllm":
            raise ValueError(
                "run.deterministic: the last bits of what scorer.engine vllm computes depend on what else is scored at "
                "the time; use transformers"
            )
        if self.run.deterministic and self.pacing.dynamic_sampling:
            raise ValueError(
                "run.deterministic: what replaces the groups that pacing.dynamic_sampling leaves out depends on which "
                "end first; use one of the two"
            )
        if self.run.deterministic and self.weights.in_flight != "wait":
            raise ValueError(
                f"weights.in_flight: with {self.weights.in_flight}, completions depend on when new weights come; "
                "run.deterministic needs wait"
            )
        self._is_watched_soundly()
        check_broadcasts(self.weights, self.model, self.trainer, self.rollout, self.scorer)
        need = self.data.max_prompt_tokens + self.rollout.sampling.max_tokens
        for part in ("rollout", "scorer"):
            limit = getattr(self, part).max_model_len
            if limit is not None and need > limit:
                raise ValueError(
                    f"{part}.max_model_len: {limit} is less than data.max_prompt_tokens + "
                    f"rollout.sampling.max_tokens ({need})"
                )
        return self

    @model_validator(mode="after")
    def constant_has_a_length(self) -> Self:
        if self.trainer.aggregation == "constant" and self.trainer.aggregation_length is None:
            # Sections are frozen for those who read them; this one's default lies in another.
            object.__setattr__(self.trainer, "aggregation_length", self.rollout.sampling.max_tokens)
        return self

    @property
    def combined(self) -> Combine:
        """How the rewards that the recipe lists are joined: as it says, or as its algorithm has it."""
        return self.combine or default_combine(self.trainer.algorithm)

    def _is_watched_soundly(self) -> None:
        every = self.trainer.checkpoints.every
        if self.evaluation is not None and self.evaluation.every % every:
            raise ValueError(
                f"evaluation.every: {self.evaluation.every} is not a multiple of trainer.checkpoints.every ({every}): "
                "the best version needs a checkpoint"
            )
        if self.guard is not None and self.guard.action == "raise_beta" and self.trainer.kl_beta == 0:
            raise ValueError("guard.action: raise_beta needs trainer.kl_beta above 0: at 0 no reference is loaded")

    @property
    def has_orders(self) -> bool:
        """Whether the trainer may be given orders, and so waits after its last step for the last of them."""
        return self.evaluation is not None or (self.guard is not None and self.guard.action != "alarm")

    @property
    def spec(self) -> RewardSpec | None:
        """The spec written out in the recipe; none when `rewards` names one the reward server knows."""
        if isinstance(self.rewards, str):
            return None
        return RewardSpec(rewards=self.rewards, combine=self.combined)

    @property
    def weights_dir(self) -> Path | str:
        return self.weights.dir or self.run.dir / "weights"


def _override(tree: dict[str, Any], assignment: str) -> None:
    key, found, text = assignment.partition("=")
    if not found or not key:
        raise RecipeError(f"override {assignment!r}: write it as key.sub=value")
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise RecipeError(f"override {assignment!r}: `{part}` in {key!r} is not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {assignment!r}: the value is not YAML: {error}") from error


def _valid_here(location: tuple[int | str, ...]) -> str:
    """The keys that would be valid beside a refused one."""
    section: Any = Recipe
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        kinds = get_args(field.annotation) or (field.annotation,) if field is not None else ()
        section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    names = getattr(section, "model_fields", None)
    return f"; valid keys here: {', '.join(names)}" if names else ""


def explain(error: ValidationError) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_valid_here(fault['loc'])}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: is required")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            unshown = isinstance(fault["input"], dict) or key == "queue.url"  # a redis URL may carry a password
            given = "" if unshown else f" (got {fault['input']!r:.200})"
            lines.append(f"{key}: {message}{given}" if key != "recipe" else message)
    return "\n".join(lines)


def tree_of(overrides: Sequence[str]) -> dict[str, Any]:
    """What `overrides` alone say. Raises RecipeError."""
    tree: dict[str, Any] = {}
    for assignment in overrides:
        _override(tree, assignment)
    return tree


def parse(tree: Any, overrides: list[str] | None = None) -> Recipe:
    """Raises RecipeError."""
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a YAML mapping with the sections " + ", ".join(Recipe.model_fields))
    tree = deepcopy(tree)
    for assignment in overrides or []:
        _override(tree, assignment)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(explain(error)) from error


def redis_url(recipe: Recipe) -> str | None:
    """`queue.url`, or where the recipe has none RLIF_REDIS_URL: a password has no place in a file or an argument list.

    Raises RecipeError when that variable holds no redis URL; its value is not shown.
    """
    if recipe.queue.url is not None:
        return recipe.queue.url
    given = os.environ.get("RLIF_REDIS_URL") or None
    try:
        return given and of_scheme(given, *REDIS_SCHEMES)
    except ValueError as error:
        raise RecipeError(f"RLIF_REDIS_URL: {error}") from None


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; any other value, lists too, takes the place of the base's."""
    made = dict(base)
    for key, value in changes.items():
        below = made.get(key)
        made[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return made


def read(path: Path) -> Any:
    """A recipe file's tree. One that `extends: OTHER.yaml` (beside it) is that recipe with its own keys merged in.

    Raises RecipeError.
    """
    tree = _read(path)
    seen = [path]
    while isinstance(tree, dict) and "extends" in tree:
        name = tree.pop("extends")
        if not isinstance(name, str) or not name:
            raise RecipeError(f"{seen[-1]}: extends: names one other recipe file (got {name!r:.80})")
        base_path = seen[-1].parent / name
        if base_path.resolve() in [one.resolve() for one in seen]:
            raise RecipeError(f"{path}: extends: goes in a circle: {' -> '.join(map(str, [*seen, base_path]))}")
        seen.append(base_path)
        base = _read(base_path)
        if not isinstance(base, dict):
            raise RecipeError(f"{base_path}: is no YAML mapping to extend")
        tree = merged(base, tree)
    return tree


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, with `key.sub=value` overrides (values in YAML). Raises RecipeError."""
    return parse(read(path), overrides)


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load` reads back to the same settings."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
