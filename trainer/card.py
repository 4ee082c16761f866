"""The model card of a run's weights: where they come from, what made them, what was measured."""

import json
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import yaml

from services import recipe as recipes
from services.contract import Version
from services.recipe import Recipe
from services.steps import StepsError, read_steps

SHOWN = ("model", "data", "rollout", "rewards", "combine", "scorer", "pacing", "trainer")
"""The parts of a recipe that say what was done; the others say where."""
PRIVATE = ("url", "urls", "key_env", "endpoint", "headers")
MEASURED = ("reward_mean", "loss", "kl", "entropy", "completion_length", "stop_share", "valid_fraction", "grad_norm")


def write(run_dir: Path, version: Version) -> str:
    """Markdown with a YAML header for the Hugging Face hub, from `recipe.yaml`, `steps.jsonl` and `evaluations.jsonl`
    where they are there. Neither addresses nor folders of this machine are in it."""
    from huggingface_hub import ModelCardData

    path = run_dir / "recipe.yaml"
    recipe = recipes.load(path) if path.exists() else None
    base = recipe.model.path if recipe else None
    data = ModelCardData(
        base_model=base if base and _is_public(base) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rlif", "reinforcement-learning", *([recipe.trainer.algorithm] if recipe else [])],
    )
    name = recipe.run.name if recipe else run_dir.name
    parts = [f"---\n{data.to_yaml()}\n---", f"# {name}, step {version.version}"]
    parts.append(
        f"Trained with rlif {version_of('rlif')} from `{_short(base) if base else 'an unknown model'}`"
        f"{f' with the rewards {_rewards(recipe)}' if recipe else ''}: weights {version} (lineage.step)."
    )
    parts.append(
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this repository or folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this repository or folder")\n```\n\n'
        "vLLM serves it with `vllm serve`; rlif goes on from it with `rlif train RECIPE --resume-from FOLDER`."
    )
    parts += [_steps(run_dir, version.version), _evaluations(run_dir, version.version)]
    if recipe:
        tree = {key: value for key, value in recipe.model_dump(mode="json").items() if key in SHOWN}
        parts.append(f"## Recipe\n\n```yaml\n{yaml.safe_dump(_public(tree), sort_keys=False).strip()}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _rewards(recipe: Recipe) -> str:
    if isinstance(recipe.rewards, str):
        return f"`{recipe.rewards}`"
    return ", ".join(f"`{term.name}` (weight {term.weight:g})" for term in recipe.rewards)


def _steps(run_dir: Path, step: int) -> str:
    """A table of the first and the last step that these weights hold."""
    try:
        rows = [row for row in read_steps(run_dir / "steps.jsonl") if row["step"] <= step]
    except StepsError:
        return ""
    if not rows:
        return ""
    first, last = rows[0], rows[-1]
    more = sorted(key for key in last if key.startswith(("components.", "accuracy.")))
    lines = [f"| {key} | {first.get(key, '')} | {last[key]} |" for key in (*MEASURED, *more) if key in last]
    table = [f"| | step {first['step']} | step {last['step']} |", "| --- | --- | --- |", *lines]
    return "## In training\n\n" + "\n".join(table)


def _evaluations(run_dir: Path, step: int) -> str:
    """A table of the evaluations up to these weights; one row each."""
    path = run_dir / "evaluations.jsonl"
    if not path.exists():
        return ""
    found: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            at = int(row["version"]["version"])
            if at <= step:
                found[at] = {key: value for key, value in row["metrics"].items() if isinstance(value, int | float)}
        except (ValueError, KeyError, TypeError, AttributeError):  # torn by a crash, or of another version
            continue
    keys = sorted({key for metrics in found.values() for key in metrics})
    if not keys:
        return ""
    rows = [
        f"| {at} | " + " | ".join(f"{found[at][key]:.4g}" if key in found[at] else "" for key in keys) + " |"
        for at in sorted(found)
    ]
    return "## Held-out tasks\n\n" + "\n".join(
        [f"| step | {' | '.join(keys)} |", "| --- " * (len(keys) + 1) + "|", *rows]
    )


def _is_public(path: str) -> bool:
    """A name on the hub, not a folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _short(path: str) -> str:
    return path if _is_public(path) else Path(path).name


def _public(value: Any) -> Any:
    """Without addresses and credentials, and paths of this machine by their last name."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items() if key not in PRIVATE and item is not None}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and "://" in value:
        return value.split("://")[0] + "://..."
    return Path(value).name if isinstance(value, str) and value.startswith("/") and "\n" not in value else value
