"""Fixtures that many tests share. Slow parts (models, engines, redis) start once per run."""

from pathlib import Path

import pytest
from tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A 2-layer random Qwen2, V = 288, with tokenizer: a Hugging Face folder."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))
