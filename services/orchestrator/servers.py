"""The run's rollout and reward servers: reached by routes, checked to fit together, given the recipe's reward spec."""

import logging
import os
from typing import Any

from services.clients import Refused, RewardClient, RolloutClient, ServerFault, ServiceClient
from services.orchestrator.routing import Routes
from services.recipe import Recipe
from services.spec import RewardSpec
from services.startup import StartupError

log = logging.getLogger(__name__)

CHECK_SECONDS = 15.0


class Servers:
    """`recipe_changed`: the recipe's spec is not the one that an earlier start of this run installed.

    Tokens come from RLIF_API_TOKEN and RLIF_ADMIN_TOKEN. Raises StartupError when a URL is none.
    """

    def __init__(self, recipe: Recipe, rollout_urls: list[str], reward_urls: list[str], recipe_changed: bool):
        self.recipe, self.recipe_changed = recipe, recipe_changed
        self.spec_name = recipe.run.name if recipe.spec else str(recipe.rewards)
        self.specs: dict[str, RewardSpec | None] = {self.spec_name: recipe.spec}
        self.evaluation_spec = ""
        if recipe.evaluation is not None:
            spec = recipe.evaluation.spec
            self.evaluation_spec = f"{recipe.run.name}.evaluation" if spec else str(recipe.evaluation.rewards)
            self.specs.setdefault(self.evaluation_spec, spec)
        self._vocabularies: dict[str, int] = {}
        self._installed: set[tuple[str, str]] = set()
        tokens = (os.environ.get("RLIF_API_TOKEN") or None, os.environ.get("RLIF_ADMIN_TOKEN") or None)
        try:
            # Failing over to another server beats waiting for the same one, so the clients themselves do not retry.
            rollouts = [RolloutClient(url, *tokens, retry_seconds=0) for url in rollout_urls]
            rewards = [RewardClient(url, *tokens, retry_seconds=0) for url in reward_urls]
            self.rollouts = Routes("rollout", rollouts, self._prepare_rollout, recipe.rollout.deadline_seconds)
            self.rewards = Routes("reward", rewards, self._prepare_reward, recipe.scorer.deadline_seconds)
        except ValueError as error:
            raise StartupError(str(error)) from error

    async def close(self) -> None:
        await self.rollouts.close()
        await self.rewards.close()

    def has_scorer(self, client: RewardClient) -> bool:
        return client.url in self._vocabularies

    async def _prepare_rollout(self, client: RolloutClient) -> None:
        self._agree(client, "rollout", await self._describe(client, "rollout"))

    async def _prepare_reward(self, client: RewardClient) -> None:
        self._agree(client, "reward", await self._describe(client, "reward"))
        await self.install_specs(client)

    async def _describe(self, client: ServiceClient, service: str) -> dict[str, Any]:
        try:
            return await client.model(CHECK_SECONDS)
        except (Refused, ServerFault) as error:
            if service == "reward" and isinstance(error, Refused) and (error.status, error.title) == (404, "No model"):
                return {}  # it was started without a scorer
            raise StartupError(f"{client.url} cannot be used as a {service} server: {error}") from error

    def _agree(self, client: ServiceClient, service: str, served: dict[str, Any]) -> None:
        """Token ids must mean the same everywhere. Raises StartupError."""
        model, size = served.get("model"), served.get("vocab_size")
        self._vocabularies.pop(client.url, None)
        if size is None:
            log.info("%s server %s is up, without a model", service, client.url)
            return
        for url, known in self._vocabularies.items():
            if known != size:
                raise StartupError(
                    f"{service} server {client.url} serves {model} with a vocabulary of {size}, but {url} serves one "
                    f"of {known}: all servers of a run must serve the same model"
                )
        self._vocabularies[client.url] = size
        log.info("%s server %s is up, with %s (vocabulary %d)", service, client.url, model, size)
        if model != self.recipe.model.path:
            log.warning("%s serves %r, the recipe's model is %r", client.url, model, self.recipe.model.path)

    async def install_specs(self, client: RewardClient) -> None:
        """See that the server knows the run's specs; put the recipe's where it does not.

        A spec that somebody put under the run's name while the run went on stays, unless the recipe was changed since.
        Raises StartupError when the server cannot compute one, or does not know the name that the recipe gives.
        """
        for name, spec in self.specs.items():
            await self._install(client, name, spec)

    async def _install(self, client: RewardClient, name: str, spec: RewardSpec | None) -> None:
        try:
            try:
                known = await client.get_spec(name, deadline_seconds=CHECK_SECONDS)
            except Refused as error:
                if error.status != 404:
                    raise
                known = None
            if spec is None:
                if known is None:
                    raise StartupError(f"rewards: reward server {client.url} knows no spec {name!r}")
                return
            if known is not None and known.spec_id == spec.spec_id:
                return
            if known is not None and ((client.url, name) in self._installed or not self.recipe_changed):
                log.warning("%s has another spec than the recipe under %r: it stays", client.url, name)
                return
            await client.put_spec(name, spec, CHECK_SECONDS)
            self._installed.add((client.url, name))
            log.info("spec %r (%s) is put on %s", name, spec.spec_id, client.url)
        except (Refused, ServerFault) as error:
            raise StartupError(f"rewards: spec {name!r} is refused: {error}") from error
