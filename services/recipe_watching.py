"""The sections of a recipe that watch the run: evaluation, the collapse guard, and where numbers and samples go."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from services.contract import Sampling
from services.recipe_sections import Data
from services.section import Section
from services.spec import RewardSpec, RewardTerm


class Evaluation(Section):
    """Held-out tasks, answered and judged `every` so many steps (and before the first) by the run's own servers.

    `rewards` judge: terms, or the name of a spec. `best` names the metric of the best checkpoint: `accuracy` (of the
    first term that judges), `accuracy.<term>`, `value.<term>`, `length`, `stopped` or `auc`; higher is better unless
    `best_is` says lowest. `sampling` none: the rollout's own; `samples` completions of each task. `certainty`: also
    whether the model is surer of right answers (`auc`; needs a scorer).
    """

    data: Data
    every: int = Field(ge=1)
    rewards: str | list[RewardTerm]
    samples: int = Field(1, ge=1, le=1024)
    sampling: Sampling | None = None
    certainty: bool = True
    best: str = Field("accuracy", min_length=1)
    best_is: Literal["highest", "lowest"] = "highest"
    tasks_per_request: int = Field(8, ge=1, le=1024)
    max_requests_in_flight: int = Field(2, ge=1)

    @field_validator("rewards")
    @classmethod
    def spec_is_sound(cls, rewards: str | list[RewardTerm]) -> str | list[RewardTerm]:
        if not rewards:
            raise ValueError("list at least one judge, or name a spec")
        if isinstance(rewards, list):
            RewardSpec(rewards=rewards)
        return rewards

    @property
    def spec(self) -> RewardSpec | None:
        """As `Recipe.spec`, with self-certainty measured beside the judges."""
        if isinstance(self.rewards, str):
            return None
        is_there = any(term.key == "self_certainty" for term in self.rewards)
        more = [RewardTerm(name="self_certainty", weight=0.0)] if self.certainty and not is_there else []
        return RewardSpec(rewards=[*self.rewards, *more])

    @property
    def judge(self) -> str:
        """The term that `accuracy` is of."""
        return self.rewards if isinstance(self.rewards, str) else self.rewards[0].key


class Band(Section):
    """Where a signal may be. `low` and `high` are factors of its baseline, and count while the reward holds or rises;
    `at_least` and `at_most` are limits that count by themselves."""

    low: float | None = Field(None, ge=0, lt=1)
    high: float | None = Field(None, gt=1)
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def has_an_edge(self) -> Self:
        if all(edge is None for edge in (self.low, self.high, self.at_least, self.at_most)):
            raise ValueError("give `low`, `high`, `at_least` or `at_most`; null switches the signal off")
        return self


class Bands(Section):
    """By signal; null switches one off. Each is a mean over a step's completions or groups:

    `length` in tokens; `distinct`, distinct bigrams of a group's completions over all their bigrams; `entropy` in nats
    per token; `stopped`, the share that ended by itself; `answers`, distinct final answers of a group over its size;
    `kl` from the reference in nats per token (needs `trainer.kl_beta` above 0). Of the evaluations (they need
    `evaluation`): `accuracy`, and `auc`, how often a right answer is surer than a wrong one.
    """

    length: Band | None = Band(low=0.4, high=2.5)
    distinct: Band | None = Band(low=0.5)
    entropy: Band | None = Band(low=0.3, high=3.0)
    stopped: Band | None = Band(low=0.5)
    answers: Band | None = Band(low=0.4)
    kl: Band | None = Band(at_most=5.0)
    accuracy: Band | None = Band(low=0.5)
    auc: Band | None = Band(low=0.8)


class Guard(Section):
    """The collapse guard (docs/watching.md). The baseline of a signal is the median of the first `baseline` steps. A
    step is out when its value is outside the band and further than `sigmas` robust deviations from the baseline; an
    alarm is `votes` such steps of the last `window`.

    `action`, besides the alarm: `raise_beta` multiplies `trainer.kl_beta` by `beta_factor`, up to `beta_cap`;
    `roll_back` goes back to the best checkpoint from before the alarm's first step, with the learning rate times
    `rate_factor`; a second one to the same step within `again_within` steps stops the run; `stop` ends it with a
    checkpoint.
    """

    action: Literal["alarm", "raise_beta", "roll_back", "stop"] = "alarm"
    baseline: int = Field(10, ge=3)
    votes: int = Field(3, ge=1)
    window: int = Field(5, ge=1)
    sigmas: float = Field(5.0, gt=0)
    bands: Bands = Bands()
    beta_factor: float = Field(2.0, gt=1)
    beta_cap: float = Field(0.5, gt=0)
    rate_factor: float = Field(0.5, gt=0, le=1)
    again_within: int = Field(50, ge=1)
    webhook: str | None = Field(None, pattern=r"^https?://[^\s/]+\S*$")
    """Alarms are POSTed there as JSON, with RLIF_WEBHOOK_TOKEN as bearer token where that is set."""

    @model_validator(mode="after")
    def votes_fit(self) -> Self:
        if self.votes > self.window:
            raise ValueError(f"votes: {self.votes} is more than window ({self.window})")
        return self


class Wandb(Section):
    """Weights & Biases. `offline` needs no network: `wandb sync` sends the folder later."""

    project: str = Field(min_length=1, max_length=128)
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class Mlflow(Section):
    """`uri`: a tracking server, or what else MLflow takes as tracking URI (`sqlite:///...`, a folder)."""

    uri: str = Field(min_length=1)
    experiment: str = Field("rlif", min_length=1)


class Tracking(Section):
    """Beside `steps.jsonl`, which is always written. Every `samples_every` steps the step's samples are kept, with
    their components, in `samples/` and in the trackers (0: never).

    The last `groups_kept` scored groups stay in Redis for the console (0: none).

    The trainer serves Prometheus metrics on `metrics_port`, the orchestrator on the next one (none: nobody does).
    """

    tensorboard: bool = True
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None
    samples_every: int = Field(0, ge=0)
    groups_kept: int = Field(200, ge=0, le=100_000)
    metrics_port: int | None = Field(None, ge=1, le=65534)
