"""What an evaluation says of scored groups."""

import pytest
from scored_groups import make_groups

from services.contract import CompletionScore, Score
from services.orchestrator.measures import measure


def test_metrics_leave_out_what_has_no_value():
    (group,) = make_groups(1, size=4)
    judgements = [
        Score.of(1.0, "correct"),
        Score.of(0.0, "wrong"),
        Score.of(0.0, "no_answer"),
        Score.failed("timeout", ""),
    ]
    certainties = [Score.of(3.0), Score.of(1.0), Score.of(5.0), Score.of(9.0)]
    scores = [
        CompletionScore(components={"match": a, "sure": b}, reward=None, advantage=0.0, valid=True)
        for a, b in zip(judgements, certainties, strict=True)
    ]
    found = measure([group.model_copy(update={"scores": scores})], "match", "sure")
    assert found["accuracy"] == found["accuracy.match"] == found["value.match"] == pytest.approx(1 / 3)
    assert found["value.sure"] == 4.5 and found["auc"] == 0.5 and "accuracy.sure" not in found
    assert "auc" not in measure([group.model_copy(update={"scores": scores})], "match", None)
