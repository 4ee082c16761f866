"""A whole preflight against servers that are up: tasks, prompts, answers, scores, figures, verdict."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.contract import Task
from services.orchestrator.servers import Servers
from services.preflight import report as reports
from services.preflight import sweep
from services.preflight.figures import measure, read
from services.preflight.report import Report
from services.preflight.sample import sample, with_spec
from services.preflight.terms import Terms, find_judge, measured
from services.preflight.verdict import decide
from services.prompt_tokens import load_tokenizer
from services.recipe import Recipe
from services.spec import RewardSpec
from services.startup import StartupError


@dataclass(frozen=True)
class Plan:
    """What will be asked. `recipe` is the one that the servers read; `tasks` by the prompt's name, the recipe's own
    first; `alone` says why there is no other."""

    recipe: Recipe
    terms: Terms
    tasks: dict[str, list[Task]]
    alone: str

    @property
    def count(self) -> int:
        return sum(map(len, self.tasks.values()))


def plan(recipe: Recipe, spec: RewardSpec, limit: int, others: bool) -> Plan:
    """The first `limit` tasks of the run under every prompt, or with `others` false under the recipe's own alone.
    `spec` is the recipe's reward, written out. Raises StartupError, and RecipeError."""
    tokenizer: Any = load_tokenizer(recipe.model)
    tasks = sweep.choose(recipe, tokenizer, limit)
    judge = find_judge(recipe, spec, tasks)
    tried, alone = sweep.variants(recipe, tokenizer, tasks, judge.name if judge else None)
    tried = tried if others else tried[:1]
    terms = measured(spec, judge, {task.source for task in tasks})
    return Plan(with_spec(recipe, terms.spec), terms, sweep.arranged(recipe, tokenizer, tasks, tried), alone)


async def fly(chosen: Plan, run: str, samples: int, servers: Servers, done: Callable[[int], None]) -> Report:
    """`run` is the name of the recipe's run; `done` hears of every finished task. Raises CallError, and StartupError:
    the servers cannot be used for this, or no task could be answered."""
    started, terms, recipe = time.monotonic(), chosen.terms, chosen.recipe
    found, own = [], None
    for name, tasks in chosen.tasks.items():
        groups = await sample(recipe, tasks, name, samples, servers, done)
        if not groups:
            raise StartupError(f"prompt {name}: no server could answer and score a single one of {len(tasks)} tasks")
        answers = [read(group, terms) for group in groups]
        found.append(measure(name, answers, len(tasks) - len(groups), terms, own))
        own = answers if own is None else own
    version = max(one.weight_version for group in groups for one in group.completions)
    judged = terms.judge is not None
    return Report(
        run=run,
        model=recipe.model.path,
        data=recipe.data.path,
        seed=recipe.run.seed,
        samples=samples,
        judge=terms.judge,
        sweep=chosen.alone,
        weight_version=str(version),
        seconds=time.monotonic() - started,
        verdict=decide(found[0], samples, judged, terms.trained),
        best_prompt=reports.best_prompt(found, judged, chosen.alone),
        best_reward=reports.best_reward(found[0], judged),
        limits=reports.limits(judged, version),
        prompts=found,
    )
