"""Fixtures that many tests share. Slow parts (models, engines, redis) start once per run."""

import importlib.util
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import redis as redis_py
from tiny import make_tiny_model

from services.redis import EmbeddedRedis, connect_sync

# A busy machine is no finding.
hypothesis.settings.register_profile("rlif", deadline=None)
hypothesis.settings.load_profile("rlif")


def pytest_configure() -> None:
    if os.environ.get("RLIF_REQUIRE_VLLM") and importlib.util.find_spec("vllm") is None:
        raise pytest.UsageError("RLIF_REQUIRE_VLLM is set but vLLM is not installed: its tests would be skipped")
    if os.environ.get("RLIF_REQUIRE_BROWSER") and not (shutil.which("chromium") and shutil.which("chromedriver")):
        raise pytest.UsageError("RLIF_REQUIRE_BROWSER is set but chromium or chromedriver is missing")
    if os.environ.get("RLIF_REQUIRE_PROMETHEUS") and not (shutil.which("prometheus") and shutil.which("promtool")):
        raise pytest.UsageError("RLIF_REQUIRE_PROMETHEUS is set but prometheus or promtool is missing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of two workers one would else begin them when the other has no more to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A 2-layer random Qwen2, V = 288, with tokenizer: a Hugging Face folder."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[EmbeddedRedis]:
    """One real redis-server for all tests: they keep apart by fresh run ids, and leave it running."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: EmbeddedRedis) -> str:
    return redis_server.url


@pytest.fixture
def run_id() -> str:
    """A run that nobody had before."""
    return uuid.uuid4().hex


@pytest.fixture
def redis(redis_url: str) -> Iterator[redis_py.Redis]:
    """A blocking client; modules of asynchronous code have one of their own."""
    with connect_sync(redis_url) as client:
        yield client
