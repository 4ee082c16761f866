"""The transformers engine's generation against slow, obvious references."""

import asyncio
import contextlib
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_capped_model, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_server.engines.base import Aborted, EngineSettings, Prompt
from rollout_server.engines.generation import generate, rows_of
from rollout_server.engines.sampling import Rows, choose, draw, draw_filtered
from rollout_server.engines.stopping import StopStrings, cut
from rollout_server.engines.transformers import TransformersEngine
from services.contract import Sampling, Version, VersionSpan
from services.startup import StartupError
from services.weights.shapes import WeightsMismatch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def oracle(tiny_model):
    """The same model in float64."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = TransformersEngine(
        EngineSettings(tiny_model, "tiny", dtype="float32", device="cpu", threads=1, max_batch_sequences=64)
    )
    asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.stop())


def prompt(text: str, tokenizer, n: int = 4, **sampling) -> Prompt:
    return Prompt(text, tokenizer(text).input_ids, n, Sampling(**{"max_tokens": 24, "seed": 7, **sampling}))


def run(model, tokenizer, prompts, eos=(), max_model_len=1024, **options):
    rows = rows_of(prompts, max_model_len)
    stops = StopStrings(tokenizer, {row.number: row.sampling.stop for row in rows if row.sampling.stop})
    return generate(model, rows, list(eos), stops, lambda: False, **options)


def log_probabilities(oracle, prompt_ids, token_ids, temperature) -> np.ndarray:
    """log p [T, V] of the distributions that produced `token_ids`, by one unpadded float64 forward, no cache."""
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1].numpy()
    scaled = logits / temperature
    return (
        scaled
        - np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1, keepdims=True))
        - scaled.max(1, keepdims=True)
    )


PROMPTS = ["a", "The sun rises in the", "12 + 30 =", "x" * 40]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.8, 0), (1.0, 5)])
def test_logprobs_are_those_of_a_plain_forward(model, oracle, tokenizer, temperature, top_p, top_k):
    """Different prompt lengths in one batch: left padding and the shared prefill must leave no trace."""
    asked = [prompt(text, tokenizer, 3, temperature=temperature, top_p=top_p, top_k=top_k) for text in PROMPTS]
    drawn = run(model, tokenizer, asked)
    for place, one in enumerate(drawn):
        reference = log_probabilities(oracle, asked[place // 3].token_ids, one.token_ids, temperature)
        expected = reference[np.arange(len(one.token_ids)), one.token_ids]
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


def test_greedy_is_the_argmax_loop(model, oracle, tokenizer):
    asked = [prompt(text, tokenizer, 1, temperature=0.0, max_tokens=12) for text in PROMPTS]
    for one, drawn in zip(asked, run(model, tokenizer, asked), strict=True):
        ids = list(one.token_ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
        assert drawn.token_ids == ids[len(one.token_ids) :]
        expected = log_probabilities(oracle, one.token_ids, drawn.token_ids, 1.0)
        np.testing.assert_allclose(drawn.logprobs, expected[range(12), drawn.token_ids], atol=1e-4)


def test_a_group_does_not_depend_on_its_batch(model, tokenizer):
    """Alone, beside others, behind others, or with rows leaving early: the same tokens, logprobs to float noise."""
    wanted = prompt("The sun", tokenizer, 4, seed=11)
    others = [
        prompt(text, tokenizer, 5, seed=3, max_tokens=limit) for text, limit in zip(PROMPTS, (2, 40, 7, 1), strict=True)
    ]
    alone = run(model, tokenizer, [wanted])
    mixed = run(model, tokenizer, [*others, wanted])[-4:]
    assert [one.token_ids for one in mixed] == [one.token_ids for one in alone]
    for one, other in zip(mixed, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_rows_leaving_the_batch_leave_the_rest_alone(model, oracle, tokenizer):
    asked = [prompt("abc", tokenizer, 1, seed=seed, max_tokens=1 + 3 * seed) for seed in range(12)]
    drawn = run(model, tokenizer, asked)
    assert [len(one.token_ids) for one in drawn] == [1 + 3 * seed for seed in range(12)]
    last = drawn[-1]
    reference = log_probabilities(oracle, asked[-1].token_ids, last.token_ids, 1.0)
    np.testing.assert_allclose(last.logprobs, reference[np.arange(34), last.token_ids], atol=1e-4)


def test_same_seed_same_bits(model, tokenizer):
    asked = [prompt(text, tokenizer, 3, temperature=1.1) for text in PROMPTS]
    assert run(model, tokenizer, asked) == run(model, tokenizer, asked)
    other = run(model, tokenizer, [prompt(text, tokenizer, 3, temperature=1.1, seed=8) for text in PROMPTS])
    assert other != run(model, tokenizer, asked)


def test_copies_of_a_prompt_differ_and_no_seed_means_chance(model, tokenizer):
    copies = run(model, tokenizer, [prompt("abc", tokenizer, 8)])
    assert len({tuple(one.token_ids) for one in copies}) == 8
    chance = [prompt("abc", tokenizer, 1, seed=None)]
    assert run(model, tokenizer, chance) != run(model, tokenizer, chance)


def test_eos_ends_a_completion_and_is_part_of_it(model, tokenizer):
    free = run(model, tokenizer, [prompt("abc", tokenizer, 6)])
    eos = free[0].token_ids[5]
    stopped = run(model, tokenizer, [prompt("abc", tokenizer, 6)], eos=[eos, 999])
    assert stopped[0].stopped and len(stopped[0].token_ids) <= 6
    for one, other in zip(stopped, free, strict=True):
        length = other.token_ids.index(eos) + 1 if eos in other.token_ids else 24
        assert one.token_ids == other.token_ids[:length]
        assert one.stopped == (eos in other.token_ids)


def test_sliding_window_layers_see_their_window_only(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    )
    assert config.layer_types == ["full_attention", "sliding_attention"]
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    asked = [prompt(text, tokenizer, 2, temperature=0.9) for text in PROMPTS]
    drawn = run(model, tokenizer, asked)
    oracle = model.double()
    for place, one in enumerate(drawn):
        reference = log_probabilities(oracle, asked[place // 2].token_ids, one.token_ids, 0.9)
        np.testing.assert_allclose(one.logprobs, reference[np.arange(24), one.token_ids], atol=1e-4)


async def test_a_cap_on_attention_scores_is_kept(tokenizer, tmp_path):
    make_capped_model(tmp_path)
    engine = TransformersEngine(EngineSettings(tmp_path, "capped", dtype="float32", device="cpu", threads=1))
    await engine.start()
    try:
        asked = [prompt(text, tokenizer, 2, temperature=0.9) for text in PROMPTS]
        drawn = await engine.generate(asked)
    finally:
        await engine.stop()
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    for one, completions in zip(asked, drawn, strict=True):
        for completion in completions:
            reference = log_probabilities(oracle, one.token_ids, completion.token_ids, 0.9)
            expected = reference[np.arange(len(completion.token_ids)), completion.token_ids]
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_the_context_bounds_a_completion(model, tokenizer):
    drawn = run(model, tokenizer, [prompt("abcd", tokenizer, 1, max_tokens=50)], max_model_len=10)
    assert len(drawn[0].token_ids) == 6 and not drawn[0].stopped


def test_the_model_sees_no_more_than_one_prefill_per_prompt(model, tokenizer):
    shapes = []
    handle = model.register_forward_pre_hook(lambda _, __, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True)
    run(model, tokenizer, [prompt("abc", tokenizer, 8, max_tokens=3), prompt("abcd", tokenizer, 8, max_tokens=3)])
    handle.remove()
    assert shapes == [(2, 4), (16, 1), (16, 1)]


def test_an_abort_is_noticed(model, tokenizer):
    rows = rows_of([prompt("abc", tokenizer, 2)], 1024)
    with pytest.raises(Aborted, match="after 1 tokens with 2 of 2"):
        generate(model, rows, [], StopStrings(tokenizer, {}), lambda: True)


def test_steps_are_told_as_they_happen(model, oracle, tokenizer):
    steps = []
    drawn = run(model, tokenizer, [prompt("abc", tokenizer, 2, max_tokens=5)], emit=steps.append, top_logprobs=3)
    for number, one in enumerate(drawn):
        told = [token for step in steps for row, token in step if row == number]
        assert [token.id for token in told] == one.token_ids and [token.logprob for token in told] == one.logprobs
    reference = log_probabilities(oracle, tokenizer("abc").input_ids, drawn[1].token_ids, 1.0)
    for place, step in enumerate(steps):
        expected = np.argsort(-reference[place])[:3]
        ids, values = zip(*step[1][1].top, strict=True)
        assert list(ids) == expected.tolist()
        np.testing.assert_allclose(values, reference[place][expected], atol=1e-4)


# ---- drawing ---------------------------------------------------------------------------------------------------


def allowed(probabilities: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The slow obvious nucleus: likeliest first, until `top_p` of the mass of the `top_k` is in."""
    order = np.argsort(-probabilities, kind="stable")[: top_k or None]
    mass = probabilities[order].sum()
    kept, held = set(), 0.0
    for token in order:
        kept.add(int(token))
        held += probabilities[token]
        if held >= top_p * mass:
            break
    return kept


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 40),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 3.0),
)
def test_filters_keep_exactly_the_nucleus(seed, vocab, top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocab, generator=generator).repeat(400, 1) * 2
    # A regular grid of uniforms reaches every token that holds more than 1/400 of the kept mass.
    uniforms = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    rows = Rows.of([Sampling(temperature=temperature, top_k=top_k, top_p=top_p)] * 400, vocab, CPU)
    tokens, logprobs = choose(logits, rows, uniforms)
    probabilities = torch.softmax(logits[0].double() / temperature, -1).numpy()
    np.testing.assert_allclose(logprobs[0].exp().numpy(), probabilities, rtol=1e-4, atol=1e-7)
    kept = allowed(probabilities, top_k, top_p)
    edge = allowed(probabilities, top_k, min(1.0, top_p + 1e-6))
    drawn = set(tokens.tolist())
    assert drawn <= kept | edge
    mass = sum(probabilities[token] for token in kept)
    assert drawn >= {token for token in kept if probabilities[token] / mass > 2.01 / 400}


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([[0.1, 0.0, 0.55, 0.35]])
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(20000, generator=generator, dtype=torch.float64)
    counts = Counter(draw(probabilities.expand(20000, -1), uniforms).tolist())
    assert set(counts) == {0, 2, 3}
    for token, expected in [(0, 0.1), (2, 0.55), (3, 0.35)]:
        assert abs(counts[token] / 20000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 20000)


@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.3, 1.0]), min_size=1, max_size=9).filter(any))
@settings(max_examples=100, deadline=None)
def test_no_uniform_draws_an_impossible_token(weights):
    edges = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    table = torch.tensor([weights]).expand(4, -1)
    for tokens in (draw(table, edges), draw_filtered(table, torch.full((4,), 9), torch.ones(4).double(), edges)):
        assert all(weights[token] > 0 for token in tokens.tolist())


def test_greedy_and_sampled_rows_share_a_batch(model, tokenizer):
    greedy = prompt("abc", tokenizer, 1, temperature=0.0)
    sampled = prompt("abc", tokenizer, 1, temperature=1.3, top_p=0.9)
    mixed = run(model, tokenizer, [greedy, sampled])
    assert [one.token_ids for one in mixed] == [run(model, tokenizer, [one])[0].token_ids for one in (greedy, sampled)]


# ---- the engine ------------------------------------------------------------------------------------------------


async def test_stop_strings_end_the_text_before_them(engine):
    tokenizer = engine.tokenizer
    [free] = await engine.generate([prompt("abc", tokenizer, 6, max_tokens=40)])
    stop = free[0].text[10:12]
    [stopped] = await engine.generate([prompt("abc", tokenizer, 6, max_tokens=40, stop=[stop, "never seen"])])
    assert stopped[0].finish_reason == "stop" and len(stopped[0].token_ids) < 40
    for one, other in zip(stopped, free, strict=True):
        assert stop not in one.text and other.text.startswith(one.text)
        assert one.token_ids == other.token_ids[: len(one.token_ids)]
        assert one.finish_reason == ("stop" if stop in other.text else other.finish_reason)


def test_cut_takes_the_first_stop_in_the_text():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["x"]) == "one"


async def test_a_large_request_is_cut_into_runs_and_says_the_same(engine):
    big = [prompt(text, engine.tokenizer, 40, seed=place) for place, text in enumerate(PROMPTS)]
    assert sum(one.n for one in big) > 2 * engine.settings.max_batch_sequences
    together = await engine.generate(big)
    for one, group in zip(big, together, strict=True):
        [alone] = await engine.generate([one])
        assert [completion.token_ids for completion in group] == [completion.token_ids for completion in alone]
        assert {completion.finish_reason for completion in group} <= {"length", "stop"}


async def test_other_calls_do_not_change_an_answer(engine):
    asked = [prompt("abc", engine.tokenizer, 4)]
    calm = await engine.generate(asked)
    noise = [engine.generate([prompt(text, engine.tokenizer, 9, seed=None)]) for text in PROMPTS]
    answers = await asyncio.gather(*noise, engine.generate(asked))
    assert answers[-1] == calm


async def test_a_cancelled_call_frees_the_engine(engine):
    call = asyncio.ensure_future(engine.generate([prompt("abc", engine.tokenizer, 64, max_tokens=1000)]))
    await asyncio.sleep(0.1)
    call.cancel()
    async with asyncio.timeout(5):
        await engine.generate([prompt("abc", engine.tokenizer, 1, max_tokens=2)])


async def test_weights_of_another_model_are_refused_and_change_nothing(engine, tmp_path):
    asked = [prompt("abc", engine.tokenizer, 2)]
    before = await engine.generate(asked)
    with pytest.raises(WeightsMismatch, match="model.layers"):
        await engine.load(Version(version=9), make_tiny_model(tmp_path / "other", hidden=32))
    with pytest.raises(WeightsMismatch, match="missing"):
        await engine.load(Version(version=9), tmp_path)
    assert engine.state() == "ok" and engine.version == Version()
    assert await engine.generate(asked) == before


@pytest.mark.parametrize("tied", [True, False])
async def test_loaded_weights_equal_a_fresh_engine(tmp_path, tied):
    settings = {"dtype": "float32", "device": "cpu", "threads": 1}
    first, second = (make_tiny_model(tmp_path / str(seed), seed=seed, tied=tied) for seed in (1, 2))
    follower, fresh = (TransformersEngine(EngineSettings(path, "tiny", **settings)) for path in (first, second))
    for one in (follower, fresh):
        await one.start()
    asked = [prompt("abc", fresh.tokenizer, 4, temperature=0.8)]
    before = await follower.generate(asked)
    await follower.load(Version(lineage=1, version=3), second)
    [after], [expected] = await follower.generate(asked), await fresh.generate(asked)
    assert before != [after]
    assert [(one.token_ids, one.logprobs) for one in after] == [(one.token_ids, one.logprobs) for one in expected]
    assert {one.weight_version for one in after} == {Version(lineage=1, version=3)}
    for one in (follower, fresh):
        await one.stop()


# ---- new weights amid a batch --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory):
    place = tmp_path_factory.mktemp("versions")
    folders = [make_tiny_model(place / str(seed), seed=seed) for seed in (1, 2)]
    return folders, [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval() for folder in folders]


@contextlib.asynccontextmanager
async def loading_amid(folder, in_flight: str, at: tuple[int, ...], source):
    """An engine to which new weights come at those steps of whatever it generates."""
    engine = TransformersEngine(
        EngineSettings(folder, "tiny", dtype="float32", device="cpu", threads=1, in_flight=in_flight)
    )
    await engine.start()
    loads, steps, loop = [], 0, asyncio.get_running_loop()

    def count(*_) -> None:
        nonlocal steps
        steps += 1
        if steps in at:
            version = Version(version=len(loads) + 1)
            loads.append(asyncio.run_coroutine_threadsafe(engine.load(version, source), loop))
            while engine._pending is None:
                time.sleep(0.001)

    engine.model.register_forward_pre_hook(count)
    yield engine, loads
    for load in loads:
        await asyncio.wrap_future(load)
    await engine.stop()


async def test_wait_finishes_the_batch_first(two_versions):
    folders, _ = two_versions
    async with loading_amid(folders[0], "wait", (9,), folders[1]) as (engine, _):
        [group] = await engine.generate([prompt("abc", engine.tokenizer, 4)])
        assert {one.weight_version for one in group} == {Version()} and not any(one.version_spans for one in group)
        [group] = await engine.generate([prompt("abc", engine.tokenizer, 4)])
        assert {one.weight_version for one in group} == {Version(version=1)}


async def test_keep_goes_on_with_the_new_weights(two_versions):
    """Every token is drawn from the distribution that its own version has after all that came before it."""
    folders, oracles = two_versions
    asked = ["abc", "a longer prompt"]
    async with loading_amid(folders[0], "keep", (9,), folders[1]) as (engine, _):
        groups = await engine.generate([prompt(text, engine.tokenizer, 3) for text in asked])
        tokenizer = engine.tokenizer
    whole, mixed = 0, 0
    for text, group in zip(asked, groups, strict=True):
        ids = tokenizer(text).input_ids
        for one in group:
            spans = one.version_spans or [VersionSpan(start=0, weight_version=one.weight_version)]
            whole, mixed = whole + (not one.version_spans), mixed + bool(one.version_spans)
            if one.version_spans:
                # The first forward is the prompts', so the ninth makes token 8.
                assert [(span.start, span.weight_version.version) for span in spans] == [(0, 0), (9, 1)]
            assert one.weight_version == Version()
            expected = [log_probabilities(oracle, ids, one.token_ids, 1.0) for oracle in oracles]
            for place, (token, logprob) in enumerate(zip(one.token_ids, one.logprobs, strict=True)):
                made_by = max((span for span in spans if span.start <= place), key=lambda span: span.start)
                assert abs(expected[made_by.weight_version.version][place, token] - logprob) < 1e-4
    assert mixed and whole + mixed == 6


async def test_abort_begins_again_once(two_versions):
    folders, _ = two_versions
    asked = lambda engine: [prompt("abc", engine.tokenizer, 4, max_tokens=40), prompt("x", engine.tokenizer, 2)]  # noqa: E731
    async with loading_amid(folders[1], "wait", (), folders[1]) as (fresh, _):
        expected = await fresh.generate(asked(fresh))
    async with loading_amid(folders[0], "abort", (9, 20), folders[1]) as (engine, loads):
        groups = await engine.generate(asked(engine))
        assert len(loads) == 2  # the second came while the batch was made for the second time, and had to wait
        for group, other in zip(groups, expected, strict=True):
            assert [(one.token_ids, one.logprobs) for one in group] == [(one.token_ids, one.logprobs) for one in other]
            assert {one.weight_version for one in group} == {Version(version=1)}
        await engine.generate(asked(engine))
        assert engine.version == Version(version=2)


async def test_abort_takes_nothing_back_that_was_sent(two_versions):
    folders, _ = two_versions
    sent = []
    async with loading_amid(folders[0], "abort", (5,), folders[1]) as (engine, _):
        [group] = await engine.generate([prompt("abc", engine.tokenizer, 1)], emit=sent.extend)
    assert [token.id for _, token in sent] == group[0].token_ids and group[0].weight_version == Version()


@pytest.mark.parametrize("in_flight", ["keep", "abort"])
async def test_refused_weights_leave_the_batch_as_it_was(two_versions, tmp_path, in_flight):
    folders, _ = two_versions
    async with loading_amid(folders[0], "wait", (), folders[0]) as (fresh, _):
        expected = await fresh.generate([prompt("abc", fresh.tokenizer, 4)])
    async with loading_amid(folders[0], in_flight, (9,), tmp_path) as (engine, loads):
        assert await engine.generate([prompt("abc", engine.tokenizer, 4)]) == expected
        with pytest.raises(WeightsMismatch):
            await asyncio.wrap_future(loads.pop())


def test_settings_that_cannot_work_are_refused(tiny_model):
    with pytest.raises(StartupError, match="--max-model-len 2048: the model takes at most 1024"):
        TransformersEngine(EngineSettings(tiny_model, "tiny", max_model_len=2048))
    with pytest.raises(StartupError, match="tensor-parallel-size"):
        TransformersEngine(EngineSettings(tiny_model, "tiny", tensor_parallel_size=2))
