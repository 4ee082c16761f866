"""Rewards from the scoring pass over real HTTP, against float64 forwards of the scorer and the reference model."""

import json
import math
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scoring_oracle import model_oracle
from served import served
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward_server.app import Settings, create
from reward_server.rewards import REWARDS
from reward_server.scorer import reductions
from reward_server.scorer.metrics import METRICS
from reward_server.scorer.transformers import TransformersScorer
from services import recipe
from services.api import TokenSpan
from services.recipe import RecipeError
from services.startup import StartupError

SIGNED = {
    "self_certainty": ("self_certainty", 1),
    "token_entropy": ("token_entropy", -1),
    "sequence_logprob": ("sequence_logprob", 1),
    "mean_logprob": ("mean_logprob", 1),
    "perplexity": ("perplexity", -1),
    "mean_probability": ("mean_probability", 1),
    "topk_confidence": ("topk_confidence", 1),
    "margin": ("margin", 1),
    "varentropy": ("varentropy", -1),
    "kl_to_reference": ("kl_to_reference", -1),
}
"""Rewards by the metric that they read, and the sign that makes a positive weight reward confidence (or nearness)."""
EOS = 2
COMPLETIONS = [[20, 30, 40, 50, 60, 70], [33], [90, 80, 70, EOS, 60, 50], [], list(range(100, 160))]
"""Ordinary, one token, tokens after the EOS, empty, long."""
COUNTS = [6, 1, 4, 0, 60]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    return [make_tiny_model(made / str(seed), seed=seed, tied=False, scale=8.0) for seed in range(2)]


@pytest.fixture(scope="module")
def client(folders):
    settings = Settings(model=str(folders[0]), reference_model=str(folders[1]))
    with served(create(settings)) as url, httpx.Client(base_url=url, timeout=120) as client:
        ends = time.monotonic() + 60
        while (answer := client.get("/readyz")).status_code != 200:
            assert time.monotonic() < ends, answer.text
            time.sleep(0.05)
        yield client


@pytest.fixture(scope="module")
def expected(folders):
    """Per completion of COMPLETIONS the oracle's per-token numbers; none for the empty one."""
    own, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in folders)
    prompt = AutoTokenizer.from_pretrained(folders[0])("2+2?").input_ids

    def oracle(ids, count, **options):
        return model_oracle(own, prompt, ids[:count], reference=reference, **options) if count else None

    return lambda **options: [oracle(ids, count, **options) for ids, count in zip(COMPLETIONS, COUNTS, strict=True)]


def group():
    completions = [{"text": "", "token_ids": ids} for ids in COMPLETIONS]
    return {"group_id": "g", "task": {"task_id": "t", "prompt": "2+2?"}, "completions": completions}


def components(client, terms):
    """Of each completion, by term."""
    spec = {"rewards": terms, "combine": {"normalize": "none"}}
    assert (answer := client.put("/v1/specs/asked", json=spec)).status_code == 200, answer.text
    answer = client.post("/v1/rewards", json={"groups": [group()], "spec": "asked"})
    assert answer.status_code == 200, answer.text
    return [score["components"] for score in answer.json()["groups"][0]["scores"]]


def close(value):
    return pytest.approx(value, rel=2e-5, abs=2e-5)


def test_every_reward_is_the_oracles_with_its_sign(client, expected):
    found = components(client, [{"name": name} for name in SIGNED])
    for place, oracle in enumerate(expected()):
        for name, (metric, sign) in SIGNED.items():
            score = found[place][name]
            if oracle is None:
                assert (score["outcome"], score["value"]) == ("skipped", None), name
                continue
            values = oracle[metric].numpy()
            value = {"sequence_logprob": np.sum, "perplexity": lambda v: np.exp(-v.mean())}.get(name, np.mean)(values)
            assert (score["outcome"], score["value"]) == ("ok", close(sign * value)), (place, name)
            low, high = REWARDS[name].range
            assert (low is None or low <= score["value"]) and (high is None or score["value"] <= high), name


def test_a_spec_of_all_of_them_makes_one_call_and_one_forward_a_completion(client, monkeypatch):
    """Another k and another temperature are other items, of sequences that are computed all the same once."""
    calls, sequences = [], []
    score, batch = TransformersScorer.score, TransformersScorer._score_batch

    def spied_score(self, items, *rest):
        calls.append(len(items))
        return score(self, items, *rest)

    def spied_batch(self, members):
        sequences.append(len(members))
        return batch(self, members)

    monkeypatch.setattr(TransformersScorer, "score", spied_score)
    monkeypatch.setattr(TransformersScorer, "_score_batch", spied_batch)
    terms = [{"name": name} for name in SIGNED if name != "kl_to_reference"]
    components(client, terms)
    assert (calls, sequences) == ([5], [4]), "one item a completion; the empty one needs no forward"
    calls.clear()
    sequences.clear()
    more = [
        {"name": "topk_confidence", "label": "few", "params": {"k": 3}},
        {"name": "self_certainty", "label": "warm", "params": {"temperature": 2.0}},
        {"name": "self_certainty", "label": "end", "params": {"last": 2}},
    ]
    components(client, terms + more)
    assert (calls, sequences) == ([15], [4])


def test_spans_choose_the_tokens(client, expected):
    """Cut to what there is; a completion of which nothing is left is skipped, and never 0."""
    spans = {
        "last": ({"last": 3}, slice(-3, None)),
        "middle": ({"span": [1, 5]}, slice(1, 5)),
        "from_end": ({"span": [-2, None]}, slice(-2, None)),
        "head": ({"span": [None, -1]}, slice(None, -1)),
    }
    terms = [
        {"name": name, "label": f"{name}_{label}", "params": params}
        for name in ("self_certainty", "sequence_logprob", "topk_confidence")
        for label, (params, _) in spans.items()
    ]
    found = components(client, terms)
    skipped = []
    for place, oracle in enumerate(expected()):
        for term in terms:
            name, score = term["name"], found[place][term["label"]]
            part = spans[term["label"].removeprefix(name + "_")][1]
            values = [] if oracle is None else oracle[name].numpy()[part]
            if not len(values):
                assert (score["outcome"], score["value"]) == ("skipped", None)
                skipped.append((place, score["detail"]))
                continue
            value = values.sum() if name == "sequence_logprob" else values.mean()
            assert score["value"] == close(value), (place, term)
    assert (1, "none of the completion's 1 tokens lies in [1:5]") in skipped
    assert {place for place, _ in skipped} == {1, 3}


def test_parameters_of_the_definition(client, expected):
    terms = [
        {"name": "topk_confidence", "label": "k3", "params": {"k": 3}},
        {"name": "topk_confidence", "label": "k250", "params": {"k": 250, "temperature": 0.5}},
        {"name": "margin", "label": "probabilities", "params": {"between": "probabilities"}},
        {"name": "self_certainty", "label": "verl", "params": {"preset": "verl"}},
        {"name": "self_certainty", "label": "open_r1", "params": {"preset": "open_r1"}},
        {"name": "token_entropy", "label": "half", "params": {"top_fraction": 0.5}},
        {"name": "kl_to_reference", "label": "warm", "params": {"temperature": 2.0, "last": 5}},
    ]
    found = components(client, terms)[4]
    three, many = expected(k=3)[4], expected(k=250, temperature=0.5)[4]
    entropies = np.sort(three["token_entropy"].numpy())[30:]
    wanted = {
        "k3": three["topk_confidence"].mean(),
        "k250": many["topk_confidence"].mean(),
        "probabilities": three["probability_margin"].mean(),
        "verl": three["self_certainty"].mean() + math.log(288),
        "open_r1": expected(preset="open_r1")[4]["self_certainty"].mean(),
        "half": -entropies.mean(),
        "warm": -expected(temperature=2.0)[4]["kl_to_reference"][-5:].mean(),
    }
    assert {label: found[label]["value"] for label in wanted} == {
        label: close(float(value)) for label, value in wanted.items()
    }


def test_deepconf_aggregates(client, expected):
    """Windows of 8: longer than three of the completions, which are then one window each."""
    kinds = ("mean", "lowest_group", "bottom_10", "tail")
    params = [(kind, {"aggregate": kind, "window": 8}) for kind in kinds]
    found = components(client, [{"name": "topk_confidence", "label": kind, "params": given} for kind, given in params])
    for place, oracle in enumerate(expected()):
        if oracle is None:
            continue
        values = oracle["topk_confidence"].tolist()
        got = {kind: found[place][kind]["value"] for kind in kinds}
        if len(values) <= 8:
            assert got == dict.fromkeys(kinds, close(sum(values) / len(values)))
            continue
        windows = sorted(sum(values[start : start + 8]) / 8 for start in range(len(values) - 7))
        assert len(windows) == 53
        wanted = (sum(values) / 60, windows[0], sum(windows[:5]) / 5, sum(values[-8:]) / 8)
        assert got == {kind: close(value) for kind, value in zip(kinds, wanted, strict=True)}


def test_what_params_are_refused(client):
    for name, params, words in [
        ("self_certainty", {"last": 3, "span": [0, 1]}, "give one of `last` and `span`, not both"),
        ("self_certainty", {"last": 0}, "greater than or equal to 1"),
        ("token_entropy", {"span": [0.5, 1]}, "span"),
        ("token_entropy", {"top_fraction": 0}, "greater than 0"),
        ("topk_confidence", {"k": 257}, "less than or equal to 256"),
        ("topk_confidence", {"aggregate": "median"}, "lowest_group"),
        ("sequence_logprob", {"top_fraction": 0.5}, "no such parameter"),
    ]:
        answer = client.put("/v1/specs/asked", json={"rewards": [{"name": name, "params": params}]})
        assert answer.status_code == 422 and words in answer.text, (name, params, answer.text)


# ---- /v1/score -------------------------------------------------------------------------------------------------


def ask(client, **body):
    items = [{"prompt": "2+2?", "completion_token_ids": ids} for ids in COMPLETIONS]
    return client.post("/v1/score", json={"items": items, **body})


def test_score_gives_every_metric_in_its_natural_sign(client, expected):
    answer = ask(client, metrics=list(METRICS), per_token=True, top_k=7)
    assert answer.status_code == 200, answer.text
    for result, oracle, count in zip(answer.json()["results"], expected(k=7), COUNTS, strict=True):
        assert result["n_tokens"] == count
        if oracle is None:
            assert result["scores"] == {}
            continue
        for name in METRICS:
            assert result["per_token"][name] == close(oracle[name].tolist()), name
        logprobs = oracle["mean_logprob"].tolist()
        assert result["scores"]["sequence_logprob"] == close(sum(logprobs))
        assert result["scores"]["perplexity"] == close(math.exp(-sum(logprobs) / count)) and count
        assert result["scores"]["topk_confidence"] == close(oracle["topk_confidence"].mean().item())


def test_score_of_a_span(client, expected):
    answer = ask(client, metrics=["token_entropy", "perplexity"], span=[2, None], per_token=True).json()["results"]
    for result, oracle, count in zip(answer, expected(), COUNTS, strict=True):
        if count <= 2:
            assert result["scores"] == {}
            continue
        assert len(result["per_token"]["token_entropy"]) == count
        assert result["scores"]["token_entropy"] == close(oracle["token_entropy"][2:].mean().item())
        assert result["scores"]["perplexity"] == close(math.exp(-oracle["mean_logprob"][2:].mean().item()))
    both = ask(client, last=2, span=[0, 1])
    assert both.status_code == 422 and "not both" in both.text
    assert ask(client, top_k=0).status_code == 422


def test_the_model_lists_its_metrics(client):
    model = client.get("/v1/model").json()
    assert [metric["name"] for metric in model["metrics"]] == list(METRICS)
    assert all(metric["description"] and metric["per_token"] and metric["available"] for metric in model["metrics"])
    assert model["reference_model"].endswith("1")
    listed = {reward["name"]: reward for reward in client.get("/v1/rewards").json()["rewards"]}
    assert all(listed[name]["available"] for name in SIGNED)


def test_without_a_reference_model_the_divergence_is_refused(tiny_model):
    with served(create(Settings(model=str(tiny_model)))) as url, httpx.Client(base_url=url, timeout=60) as client:
        spec = client.put("/v1/specs/asked", json={"rewards": [{"name": "kl_to_reference"}]})
        assert spec.status_code == 422 and "the server has none (--reference-model" in spec.text
        asked = ask(client, metrics=["kl_to_reference"])
        assert asked.status_code == 422 and asked.json()["errors"][0]["field"] == "items[0].metrics"
        assert "needs a reference model" in asked.json()["detail"]
        model = client.get("/v1/model").json()
        unavailable = [metric["name"] for metric in model["metrics"] if not metric["available"]]
        assert (unavailable, model["reference_model"]) == (["kl_to_reference"], None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference_model": "some/model"}, "--reference-model some/model: there is no --model"),
        ({"reference_model": "some/model", "model": "another", "engine": "vllm"}, "the vllm engine holds no second"),
    ],
)
def test_a_reference_model_that_cannot_be_had_stops_the_start(settings, message):
    with pytest.raises(StartupError, match=message):
        create(Settings(**settings))


def test_a_reference_model_in_a_recipe():
    base = {
        "run": {"name": "r", "dir": "runs/r"},
        "model": {"path": "some/model"},
        "data": {"path": "data.jsonl", "fields": {"prompt": "question", "answer": "answer"}},
        "rewards": [{"name": "self_certainty"}, {"name": "kl_to_reference", "weight": 0.1}],
        "trainer": {"steps": 4, "groups_per_step": 8},
        "scorer": {"reference_model": "some/model"},
    }
    assert recipe.parse(base).scorer.reference_model == "some/model"
    base["scorer"]["engine"] = "vllm"
    with pytest.raises(RecipeError, match="reference_model: needs engine: transformers"):
        recipe.parse(base)


def test_the_command_line_scores_by_the_new_metrics(client):
    def rlif(*arguments):
        command = [sys.executable, "-m", "services.cli.main", "score", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    text = ("--url", str(client.base_url), "--prompt", "2+2?", "--completion", "four")
    metrics = ("--metric", "topk_confidence", "--metric", "perplexity", "--metric", "kl_to_reference")
    done = rlif(*text, *metrics, "--top-k", "3", "--last", "2", "--json")
    assert done.returncode == 0, done.stderr
    item = {"prompt": "2+2?", "completion": "four"}
    body = {"items": [item], "metrics": list(metrics[1::2]), "top_k": 3, "last": 2}
    answer = client.post("/v1/score", json=body).json()["results"][0]
    assert json.loads(done.stdout)["results"][0]["scores"] == answer["scores"]
    refused = rlif(*text, "--reference-model", "some/model")
    assert refused.returncode == 2 and "it goes with --model" in refused.stderr


# ---- reductions ------------------------------------------------------------------------------------------------

values_of_tokens = st.lists(st.floats(-100, 100), min_size=1, max_size=60)


@given(values=values_of_tokens, window=st.integers(1, 80))
def test_windows_are_those_of_the_slow_way(values, window):
    width = min(window, len(values))
    slow = sorted(math.fsum(values[start : start + width]) / width for start in range(len(values) - width + 1))
    array = np.array(values)
    assert sorted(reductions.window_means(array, window)) == pytest.approx(slow, abs=1e-10)
    assert reductions.lowest_group(array, window) == pytest.approx(slow[0], abs=1e-10)
    lowest = slow[: max(1, len(slow) // 10)]
    assert reductions.bottom_10(array, window) == pytest.approx(math.fsum(lowest) / len(lowest), abs=1e-10)
    assert reductions.tail(array, window) == pytest.approx(math.fsum(values[-width:]) / width, abs=1e-10)


@given(values=values_of_tokens, share=st.floats(0.01, 1.0))
def test_the_highest_share_is_that_of_the_sorted_values(values, share):
    count = math.ceil(share * len(values))
    highest = sorted(values, reverse=True)[:count]
    assert reductions.mean_of_highest(np.array(values), share) == pytest.approx(math.fsum(highest) / count, abs=1e-10)


@given(values=st.lists(st.integers(), max_size=12), start=st.integers(-20, 20), end=st.integers(-20, 20))
def test_a_span_is_pythons(values, start, end):
    assert values[TokenSpan(span=(start, end)).tokens] == values[start:end]
    assert values[TokenSpan(last=abs(start) + 1).tokens] == values[-abs(start) - 1 :]
    assert values[TokenSpan().tokens] == values
