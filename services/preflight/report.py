"""A preflight's report: the verdict, what looks best, what it cannot promise, and every figure."""

from collections.abc import Sequence

from services.contract import Version
from services.preflight.figures import RECIPE, Figures, PromptFigures
from services.preflight.verdict import Verdict, points, within

LIMITS = (
    "These are figures of the model before training. A reward of certainty changes with the model that it trains: of "
    "base models that looked equally good here, some learned and some collapsed later. Train with the guard on, "
    "evaluate, and stop early.",
    "A caution is no prediction either: the certainty of the paper's base model did not tell right from wrong at all "
    "(r = 0.00, arXiv 2505.19590), and training on it helped.",
    "The best of several prompts or rewards is flattered by chance; its interval takes no account of the choice.",
)


class Report(Figures):
    """`judge` is the reward that told right from wrong (none: no answers, so right is what the majority gives). `sweep`
    says why no other prompts were tried ("": they were). The recipe's own prompt is the first of `prompts`, and the
    verdict is on it. `weight_version` made the answers: above 0.0 the servers serve a model in training."""

    run: str
    model: str
    data: str
    seed: int
    samples: int
    judge: str | None
    sweep: str
    weight_version: str
    seconds: float
    verdict: Verdict
    best_prompt: str
    best_reward: str
    limits: list[str]
    prompts: list[PromptFigures]

    @property
    def own(self) -> PromptFigures:
        return self.prompts[0]


def best_prompt(prompts: Sequence[PromptFigures], judged: bool, sweep: str) -> str:
    """Which prompt gives the most right answers, the recipe's own first of `prompts`."""
    own = prompts[0]
    if len(prompts) == 1:
        return f"only the recipe's own prompt ({own.name}) was tried" + (f": {sweep}" if sweep else "")
    if not judged:
        return "which prompt is best cannot be told without answers"
    known = [prompt for prompt in prompts if prompt.accuracy is not None]
    if own.accuracy is None or not known:
        return "which prompt is best cannot be told: too little could be judged"
    top = max(known, key=lambda prompt: prompt.accuracy.mean if prompt.accuracy else 0.0)
    if top is own:
        rivals = [prompt.name for prompt in known[1:] if prompt.over_own is not None and prompt.over_own.is_noise]
        also = f"; within the noise of it: {', '.join(rivals)}" if rivals else ""
        return f"the recipe's own, {own.name}: {within(own.accuracy)}{also}"
    if top.over_own is None:
        return f"{top.name}: {within(top.accuracy)}, on other tasks than the recipe's own ({own.name})"
    text = f"{top.name}: {within(top.accuracy)}, against the recipe's own ({own.name}) {points(top.over_own)}"
    return f"{text}, which is within the noise" if top.over_own.is_noise else text


def best_reward(own: PromptFigures, judged: bool) -> str:
    """Which intrinsic reward picks right answers most often, with the recipe's own prompt."""
    if not judged:
        return "which reward is best cannot be told without answers"
    known = [reward for reward in own.rewards if reward.best is not None and reward.name != RECIPE]
    recipe = own.recipe
    if recipe.best is None or not known:
        return "which reward is best cannot be told: too little could be scored and judged"
    top = max(known, key=lambda reward: reward.best.mean if reward.best else 0.0)
    text = f"{top.name}: its best completions are right in {within(top.best)}"
    if top.over_recipe is None:
        return text
    text += f", against those of the recipe's reward {points(top.over_recipe)}"
    return f"{text}, which is within the noise" if top.over_recipe.is_noise else text


def limits(judged: bool, version: Version) -> list[str]:
    found = list(LIMITS)
    if not judged:
        found.append(
            "Without answers, right stands for what most completions of a group say. A majority may be wrong, and then "
            "a reward that disagrees with it may be right."
        )
    if version > Version():
        found.append(f"The servers serve weights {version} of a run: this is no model before training.")
    return found
