"""A run's redis as its services would leave it, its console over real HTTP, and the pages that come back."""

import asyncio
import json
import random
import time
import uuid
from contextlib import contextmanager
from html.parser import HTMLParser

import httpx
from scored_groups import make_groups
from served import served

from services.access import HttpSettings
from services.api import CompletionText, RewardGroup
from services.clients import RewardClient
from services.console.app import create
from services.console.source import Source
from services.contract import Task
from services.keys import Keys
from services.queue import GroupQueue
from services.redis import connect, connect_sync
from services.spec import RewardSpec

HOSTILE = "\"'></pre></td></script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"
SPEC = RewardSpec.model_validate(
    {"rewards": [{"name": "length"}, {"name": "exact_match", "weight": 0.5, "sources": ["quiz"]}]}
)
API, ADMIN = {"Authorization": "Bearer api-token"}, {"Authorization": "Bearer admin-token"}
PAGES = ("/", "/console/samples", "/console/group?entry=1-1", "/console/dead", "/console/control")
DATA = ("/console/curves", "/console/events")
GUARDED = HttpSettings(api_token="api-token", admin_token="admin-token")
CHANGES = [
    ("POST", "/v1/run/pause", None),
    ("POST", "/v1/run/resume", None),
    ("POST", "/v1/run/stop", None),
    ("PUT", "/v1/run/spec", SPEC.model_dump(mode="json")),
    ("POST", "/v1/run/dead/1-1/retry", None),
]


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


class Run:
    """A run's redis as its services would leave it."""

    def __init__(self, url: str):
        self.url, self.name = url, f"console-{uuid.uuid4().hex[:12]}"
        self.keys, self.redis = Keys(self.name), connect_sync(url)

    def step(self, step: int, lineage: int = 0, start: int = 0, **numbers) -> dict:
        row = {"step": step, "lineage": lineage, "start": start, "reward_mean": step / 10, "kl": None, **numbers}
        self.redis.xadd(self.keys.steps, {"line": json.dumps(row)})
        return row

    def status(self, **services: dict) -> None:
        for service, fields in services.items():
            self.redis.hset(self.keys.status, service, json.dumps({"at": time.time(), **fields}))

    def keep(self, groups) -> None:
        async def push():
            redis = connect(self.url)
            queue = GroupQueue(redis, self.name)
            for group in groups:
                await queue.keep(group, 1000)
            await redis.aclose()

        asyncio.run(push())

    def bury(self, *letters) -> None:
        async def push():
            redis = connect(self.url)
            queue = GroupQueue(redis, self.name)
            for index, reason in letters:
                await queue.bury(f"group-{index}", index, reason)
            await redis.aclose()

        asyncio.run(push())

    def source(self, *rewards: str) -> Source:
        return Source(self.url, self.name, rewards)


@contextmanager
def console(run, *rewards, http=None):
    with (
        served(create(run.source(*rewards), http or HttpSettings())) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


def scored_by_server(url: str, count: int = 6):
    """Groups whose scores a real reward server gave, by SPEC under the name `mine`."""
    rng = random.Random(3)
    plain = make_groups(count, seed=3, size=4)

    async def score():
        async with RewardClient(url) as client:
            await client.put_spec("mine", SPEC)
            tasks = [
                Task(task_id=str(n), source="quiz" if n % 2 else "other", prompt="2+2?", reference={"answer": "4"})
                for n in range(count)
            ]
            texts = [["4" if rng.random() < 0.5 else "5" * rng.randint(1, 9) for _ in range(4)] for _ in range(count)]
            bodies = [
                RewardGroup(
                    group_id=group.group_id,
                    task=task,
                    completions=[CompletionText(text=t, finish_reason="stop", token_ids=[1] * len(t)) for t in said],
                )
                for group, task, said in zip(plain, tasks, texts, strict=True)
            ]
            answers = (await client.rewards(bodies, "mine")).groups
        for group, task, said, answer in zip(plain, tasks, texts, answers, strict=True):
            made = [c.model_copy(update={"text": text}) for c, text in zip(group.completions, said, strict=True)]
            update = {"task": task, "completions": made, "scores": answer.scores, "spec_id": answer.spec_id}
            yield group.model_copy(update=update)

    async def collect():
        return [group async for group in score()]

    return asyncio.run(collect())


def events(client, **query):
    """Named events of the stream, in order: (name, data)."""
    with client.stream("GET", "/console/events", params=query) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])
