"""What there is to say of each reward, from the registry alone: for `GET /v1/rewards`, and for docs/rewards.md.

    python -m reward_server.catalogue docs/rewards.md

writes the part of the page below its marker anew, from the rewards' module docstrings, descriptions and parameters;
what stands above the marker is written by hand and kept.
"""

import inspect
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from reward_server.reward import Reward
from reward_server.rewards import REWARDS

MARKER = (
    "<!-- From here on written by `python -m reward_server.catalogue docs/rewards.md`: edit the docstrings instead. -->"
)
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
NAMED = {
    "scorer": "a scorer model (`--model`)",
    "reference_model": "a reference model (`--reference-model`)",
    "sandbox": "a sandbox (`--sandbox`)",
}


def prose(reward: Reward) -> str:
    """The docstring of the reward's module, less the line that names it."""
    module = inspect.getmodule(reward.score)
    _, _, rest = inspect.cleandoc((module.__doc__ if module else None) or "").partition("\n")
    return rest.strip()


def example_params(reward: Reward) -> dict[str, Any]:
    """Values for the parameters that have to be given, and for those whose field shows an example."""
    return {name: field.examples[0] for name, field in reward.params.model_fields.items() if field.examples}


def example(reward: Reward) -> list[dict[str, Any]]:
    """Terms of a spec: the reward, and before it, only measured, those that it builds on."""
    params = example_params(reward)
    builds_on = reward.depends(reward.params.model_validate(params)) if reward.depends else ()
    term: dict[str, Any] = {"name": reward.name, "weight": 1.0}
    return [{"name": key, "weight": 0.0} for key in builds_on] + [{**term, "params": params} if params else term]


def entry(reward: Reward) -> dict[str, Any]:
    """`builds_on` and `reads` (terms of the spec by key; metrics of the scoring pass) are those of the example."""
    is_read = reward.depends is not None or reward.scoring is not None
    params = reward.params.model_validate(example_params(reward)) if is_read else None
    return {
        "name": reward.name,
        "description": reward.description,
        "details": prose(reward),
        "needs": list(reward.needs),
        "range": reward.range,
        "builds_on": list(reward.depends(params)) if reward.depends else [],
        "reads": list(reward.scoring(params).metrics) if reward.scoring else [],
        "params": reward.params.model_json_schema(),
        "example": example(reward),
    }


# ---- markdown ----------------------------------------------------------------------------------------------------


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join("none" if option.get("type") == "null" else _type(option) for option in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), ", ".join(bounds)]).strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(value: Any) -> str:
    if value is None:
        return "none"
    shown = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return f"`{shown}`" if len(shown) <= 80 and "`" not in shown else "(long; see `GET /v1/rewards`)"


def _parameters(params: type[BaseModel]) -> list[str]:
    schema = params.model_json_schema()
    if not schema.get("properties"):
        return ["No parameters."]
    about = [" ".join(schema["description"].split()), ""] if "description" in schema else []
    rows = ["| parameter | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, found in schema["properties"].items():
        default = "(required)" if name in schema.get("required", []) else _default(found.get("default"))
        cells = [f"`{name}`", _type(found), default, found.get("description", "")]
        rows.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return about + rows


def _range(reward: Reward) -> str:
    low, high = reward.range
    if low is None and high is None:
        return "any number"
    if low is None or high is None:
        return f"at least {low:g}" if high is None else f"at most {high:g}"
    return f"{low:g} to {high:g}"


def _needs(reward: Reward) -> str:
    found = [
        NAMED.get(need) or (f"the task's `{need}`" if "." in need else f"the package `{need}`") for need in reward.needs
    ]
    return ", ".join(found) or "nothing"


def _section(reward: Reward) -> list[str]:
    found = entry(reward)
    facts = [f"Range: {_range(reward)}. Needs: {_needs(reward)}."]
    if found["builds_on"]:
        facts.append(f"Builds on another term: here {', '.join(f'`{key}`' for key in found['builds_on'])}.")
    if found["reads"]:
        facts.append(f"Reads off the scoring pass: {', '.join(f'`{name}`' for name in found['reads'])}.")
    terms = yaml.safe_dump({"rewards": found["example"]}, sort_keys=False, default_flow_style=None, width=110)
    return [
        f"### {reward.name}",
        "",
        reward.description,
        "",
        found["details"],
        "",
        " ".join(facts),
        "",
        *_parameters(reward.params),
        "",
        "```yaml",
        terms.strip(),
        "```",
        "",
    ]


def reference() -> str:
    """The generated part of docs/rewards.md."""
    rows = [
        f"| [{name}](#{name}) | {_cell(reward.description)} | {_range(reward)} |" for name, reward in REWARDS.items()
    ]
    lines = ["## Every reward", "", "| reward | what | range |", "| --- | --- | --- |", *rows, ""]
    for reward in REWARDS.values():
        lines += _section(reward)
    return "\n".join(lines)


def document(page: str) -> str:
    """The page with everything below the marker written anew. Raises ValueError without a marker."""
    by_hand, marker, _ = page.partition(MARKER)
    if not marker:
        raise ValueError(f"the page has no line {MARKER!r}")
    return f"{by_hand}{MARKER}\n\n{reference()}"


def main(path: Path) -> None:
    path.write_text(document(path.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
