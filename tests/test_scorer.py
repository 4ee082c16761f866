"""The transformers scorer against a float64 forward of the same model, alone and without padding."""

import json
import math
import shutil

import pytest
import torch
from scoring_oracle import model_oracle, one_number
from tiny import make_capped_model, make_tiny_model

from reward_server.scorer import transformers as transformers_scorer
from reward_server.scorer.items import TokenItem
from reward_server.scorer.metrics import METRICS
from reward_server.scorer.transformers import TransformersScorer
from services.contract import Version

EOS = 2
ALL = tuple(name for name, metric in METRICS.items() if not metric.needs_reference)
ATOL = {"varentropy": 1e-4}
"""A difference of squares of float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough logits that distributions are far from uniform; the head is not tied."""
    return make_tiny_model(tmp_path_factory.mktemp("scorer"), seed=3, tied=False, scale=8.0)


@pytest.fixture(scope="module")
def scorer(folder):
    return TransformersScorer(str(folder), "float32", "cpu")


@pytest.fixture(scope="module")
def oracle(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def tokens(count: int, seed: int) -> list[int]:
    """Ordinary tokens, no EOS among them."""
    return torch.randint(10, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compare(result, expected, count, rtol=1e-5):
    assert result.n_tokens == count
    for name, values in result.per_token.items():
        reference = expected[name]
        torch.testing.assert_close(torch.from_numpy(values), reference, rtol=rtol, atol=ATOL.get(name, 2e-5), msg=name)
        assert result.scores[name] == pytest.approx(one_number(name, reference), rel=rtol, abs=1e-5), name


@pytest.mark.parametrize("preset", ["paper", "verl", "open_r1"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_oracle(scorer, oracle, preset, temperature):
    prompt, completion = tokens(9, 1), tokens(24, 2)
    (result,) = scorer.score([TokenItem(prompt, completion, ALL, temperature, preset)])
    compare(result, model_oracle(oracle, prompt, completion, temperature, preset), 24)


def test_lengths_mixed_in_one_batch(scorer, oracle):
    """Every item is padded to the longest; the scores are those of the item alone."""
    sizes = [(1, 1), (3, 40), (17, 2), (1, 60), (30, 1), (5, 5)]
    items = [TokenItem(tokens(p, i), tokens(c, 50 + i), ALL) for i, (p, c) in enumerate(sizes)]
    for item, result in zip(items, scorer.score(items), strict=True):
        compare(result, model_oracle(oracle, item.prompt_ids, item.completion_ids), len(item.completion_ids))


def test_padding_side_does_not_matter(scorer, oracle):
    """The oracle with padding on the left, masked, says what the scorer says with padding on the right."""
    prompt, completion, pads = tokens(6, 7), tokens(12, 8), 11
    ids = torch.tensor([[0] * pads + prompt + completion])
    mask = (torch.arange(ids.shape[1]) >= pads).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = oracle(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    start = pads + len(prompt) - 1
    log_p = torch.log_softmax(logits[start : start + len(completion)], -1)
    left = -(log_p + math.log(log_p.shape[1])).mean(-1).mean().item()
    long = TokenItem(tokens(20, 9), tokens(40, 10))
    right = scorer.score([TokenItem(prompt, completion), long])[0].scores["self_certainty"]
    assert right == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize("budget", [1, 20, 64, 10_000])
def test_token_budget_changes_nothing(folder, scorer, budget):
    items = [TokenItem(tokens(4, i), tokens(3 + 5 * (i % 4), 20 + i), ALL) for i in range(9)]
    small = TransformersScorer(str(folder), "float32", "cpu", max_batch_tokens=budget)
    for one, other in zip(small.score(items), scorer.score(items), strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-5, abs=1e-5)


def test_the_temperature_and_preset_of_each_item_hold_in_a_shared_batch(scorer, oracle):
    prompt, completion = tokens(5, 1), tokens(9, 2)
    asked = [(0.5, "paper"), (1.0, "open_r1"), (2.0, "verl"), (2.0, "open_r1")]
    items = [TokenItem(prompt, completion, ALL, temperature, preset) for temperature, preset in asked]
    for (temperature, preset), result in zip(asked, scorer.score(items), strict=True):
        compare(result, model_oracle(oracle, prompt, completion, temperature, preset), 9)


@pytest.mark.parametrize("preset", ["paper", "open_r1"])
def test_scores_end_with_the_first_eos(scorer, oracle, preset):
    prompt, completion = tokens(5, 1), [*tokens(4, 2), EOS]
    followed = [*completion, 0, 0, EOS, 17]
    (result,) = scorer.score([TokenItem(prompt, followed, ALL, preset=preset)])
    compare(result, model_oracle(oracle, prompt, completion, preset=preset), 5)


def test_eos_alone_and_eos_in_the_prompt(scorer, oracle):
    prompt = [*tokens(3, 1), EOS, *tokens(3, 2)]
    (result,) = scorer.score([TokenItem(prompt, [EOS], ALL)])
    compare(result, model_oracle(oracle, prompt, [EOS]), 1)


def test_empty_completions_have_no_scores(scorer, oracle):
    prompt, completion = tokens(5, 1), tokens(4, 2)
    empty, full = scorer.score([TokenItem(prompt, [], ALL), TokenItem(prompt, completion, ALL)])
    assert (empty.n_tokens, empty.scores, empty.per_token) == (0, {}, {})
    compare(full, model_oracle(oracle, prompt, completion), 4)
    assert scorer.score([]) == []


def test_uniform_model_gives_zero(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    shutil.copytree(folder, tmp_path / "zero")
    model.save_pretrained(tmp_path / "zero")
    (result,) = TransformersScorer(str(tmp_path / "zero"), "float32", "cpu").score([TokenItem([5], [6, 7], ALL)])
    assert result.scores["self_certainty"] == pytest.approx(0, abs=1e-7)
    assert result.scores["token_entropy"] == pytest.approx(math.log(288), rel=1e-7)


def test_bfloat16_scores_are_not_on_a_coarse_grid(folder, scorer):
    """The forward is bfloat16, the reduction float32: scores come near those of the float32 model."""
    coarse = TransformersScorer(str(folder), "bfloat16", "cpu")
    items = [TokenItem(tokens(5, i), tokens(30, 30 + i)) for i in range(4)]
    for half, single in zip(coarse.score(items), scorer.score(items), strict=True):
        assert half.scores["self_certainty"] == pytest.approx(single.scores["self_certainty"], rel=0.05)
        assert half.scores["self_certainty"] * 128 % 1 != 0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (TokenItem([], [5]), "prompt: is empty"),
        (TokenItem([5], [288]), r"completion_token_ids: 288 is not a token id of this model \(0 to 287\)"),
        (TokenItem([-1], [5]), "prompt_token_ids: -1 is not"),
        (TokenItem([5], [6], ("certainty",)), r"metrics: unknown \['certainty'\]; known: self_certainty"),
        (TokenItem([5], [6], ()), "metrics"),
        (TokenItem([5], [6], ("kl_to_reference",)), "metrics: kl_to_reference needs a reference model, and the scorer"),
        (TokenItem([5], [6], top_k=0), r"top_k: must be 1 to 256 \(got 0\)"),
        (TokenItem([5], [6], preset="trl"), "preset: 'trl' is not one of paper, open_r1, verl"),
        (TokenItem([5], [6], temperature=0), "temperature: must be positive"),
        (TokenItem([5] * 1000, [6] * 25), "1025 tokens, more than the model's 1024 positions"),
    ],
)
def test_bad_items_are_named(scorer, item, message):
    with pytest.raises(ValueError, match=message):
        scorer.score([item])


# ---- heads -----------------------------------------------------------------------------------------------------


def small_model(family: str, **extra):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=1,
        **extra,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_attn_implementation("eager")  # of Gemma 2, sdpa leaves out the cap on attention scores
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        ("Granite", {"logits_scaling": 5.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Phi", {}),
    ],
)
def test_heads_that_do_more_than_multiply(folder, tmp_path, family, extra):
    model = small_model(family, **extra)
    shutil.copytree(folder, tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    scorer = TransformersScorer(str(tmp_path / "m"), "float32", "cpu")
    prompt, completion = tokens(5, 1), tokens(9, 2)
    (result,) = scorer.score([TokenItem(prompt, completion, ALL, 0.7)])
    compare(result, model_oracle(model.double().eval(), prompt, completion, 0.7), 9)


def test_an_unknown_step_after_the_head_is_refused():
    """Granite's division, hidden from the config that the scorer reads."""
    from reward_server.scorer.head import check_head, head_of

    model = small_model("Granite", logits_scaling=5.0).eval()
    model.config.model_type = "llama"
    with pytest.raises(ValueError, match="does something to its logits that the scorer does not know"):
        check_head(model, model.get_decoder(), head_of(model))


def test_rows_beyond_the_vocabulary_do_not_count(folder):
    """A head padded to more rows than config.vocab_size counts scores like the model without them."""
    from transformers import AutoModelForCausalLM

    from reward_server.scorer.head import head_of

    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = head_of(model)
    model.lm_head.weight = torch.nn.Parameter(torch.cat([model.lm_head.weight.detach(), torch.full((32, 64), 9.0)]))
    padded = head_of(model)
    assert padded.vocab_size == plain.vocab_size == 288
    assert torch.equal(padded.weight, plain.weight) and torch.equal(padded.mean_weight, plain.mean_weight)


# ---- weights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def versions(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("versions")
    return [make_tiny_model(made / str(seed), seed=seed, tied=request.param, scale=8.0) for seed in range(3)]


def test_loaded_weights_score_like_a_fresh_scorer(versions):
    items = [TokenItem(tokens(5, 1), tokens(9, 2), ALL)]
    scorer = TransformersScorer(str(versions[0]), "float32", "cpu")
    before = scorer.score(items)[0].scores
    scorer.load(Version(lineage=0, version=1), versions[1])
    fresh = TransformersScorer(str(versions[1]), "float32", "cpu").score(items)[0].scores
    assert scorer.version == Version(lineage=0, version=1)
    assert scorer.score(items)[0].scores == fresh != before


def test_ema_serves_the_moving_average(versions):
    from safetensors.torch import load_file

    scorer = TransformersScorer(str(versions[0]), "float32", "cpu", ema_decay=0.5)
    weights = [load_file(folder / "model.safetensors") for folder in versions]
    scorer.load(Version(lineage=0, version=1), versions[1])
    scorer.load(Version(lineage=0, version=3), versions[2])  # version 2 was skipped: two steps of decay
    for name, tensor in scorer.model.state_dict().items():
        if name in weights[0]:
            first = 0.5 * weights[0][name] + 0.5 * weights[1][name]
            torch.testing.assert_close(tensor, 0.25 * first + 0.75 * weights[2][name], msg=name)


def test_a_folder_that_does_not_fit_is_refused_and_the_old_weights_stay(versions, tmp_path):
    from safetensors.torch import load_file, save_file

    scorer = TransformersScorer(str(versions[0]), "float32", "cpu")
    items = [TokenItem(tokens(5, 1), tokens(9, 2))]
    before = scorer.score(items)[0].scores
    tensors = load_file(versions[1] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = {
        "is missing": {key: value for key, value in tensors.items() if key != name},
        "has no tensor": {**tensors, "model.layers.9.mlp.up_proj.weight": tensors[name].clone()},
        r"is \[64, 128\], needs \[128, 64\]": {**tensors, name: tensors[name].T.contiguous()},
    }
    for message, broken in wrong.items():
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            scorer.load(Version(lineage=0, version=1), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="not readable"):
        scorer.load(Version(lineage=0, version=1), tmp_path)
    assert scorer.version == Version(lineage=0, version=0)
    assert scorer.score(items)[0].scores == before


# ---- what items share ------------------------------------------------------------------------------------------


def count_rows(scorer, monkeypatch) -> dict[str, list[int]]:
    """Sequences of every forward, and rows of every pass through the head, from now on."""
    counted: dict[str, list[int]] = {"sequences": [], "rows": []}
    hidden, passes = scorer.causal.hidden, transformers_scorer.tiled_statistics

    def forward(ids):
        counted["sequences"].append(len(ids))
        return hidden(ids)

    def through_the_head(rows, *rest):
        counted["rows"].append(len(rows))
        return passes(rows, *rest)

    monkeypatch.setattr(scorer.causal, "hidden", forward)
    monkeypatch.setattr(transformers_scorer, "tiled_statistics", through_the_head)
    return counted


def test_items_of_one_sequence_share_its_forward_and_equal_rows(scorer, oracle, monkeypatch):
    prompt, completion, other = tokens(5, 1), tokens(9, 2), tokens(4, 3)
    items = [
        TokenItem(prompt, completion, ("self_certainty", "margin")),
        TokenItem(prompt, completion, ("topk_confidence",), top_k=5),
        TokenItem(prompt, completion, ("token_entropy",), temperature=0.5),
        TokenItem(prompt, other, ALL),
        TokenItem(prompt, completion, ALL, preset="open_r1"),
    ]
    counted = count_rows(scorer, monkeypatch)
    results = scorer.score(items)
    assert counted["sequences"] == [2]
    assert counted["rows"] == [9 + 9 + 9 + 4], (
        "temperature 1, temperature 0.5, the tokens' own rows; the other sequence"
    )
    for item, result in zip(items, results, strict=True):
        expected = model_oracle(oracle, prompt, item.completion_ids, item.temperature, item.preset, k=item.top_k)
        compare(result, expected, len(item.completion_ids))


# ---- a reference model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(versions, tmp_path_factory):
    """A scorer with a wider reference model, the float64 models of both, and the scorer's next version."""
    from transformers import AutoModelForCausalLM

    wide = make_tiny_model(tmp_path_factory.mktemp("wide"), seed=7, hidden=96, tied=False, scale=5.0)
    scorer = TransformersScorer(str(versions[0]), "float32", "cpu", reference_model=str(wide))
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (*versions[:2], wide)]
    return scorer, models, versions[1]


def test_kl_to_the_reference_model_follows_the_scorer_and_not_the_reference(pair):
    scorer, (own, following, reference), version = pair
    prompt, completion = tokens(5, 1), [*tokens(12, 2), EOS]
    items = [
        TokenItem(prompt, completion, tuple(METRICS), 0.7),
        TokenItem(prompt, [*completion, 9, 9], ("kl_to_reference",)),
        TokenItem(prompt, completion, ("self_certainty",)),
    ]
    assert scorer.has_reference
    for model in (own, following):
        warm, plain, alone = scorer.score(items)
        compare(warm, model_oracle(model, prompt, completion, 0.7, reference=reference), 13)
        compare(plain, model_oracle(model, prompt, completion, reference=reference), 13)
        assert alone.scores.keys() == {"self_certainty"}
        assert plain.scores["kl_to_reference"] > 0.05
        scorer.load(Version(lineage=0, version=1), version)


def test_a_model_is_at_no_distance_from_itself(folder):
    scorer = TransformersScorer(str(folder), "float32", "cpu", reference_model=str(folder))
    (result,) = scorer.score([TokenItem(tokens(5, 1), tokens(30, 2), ("kl_to_reference",))])
    assert result.per_token["kl_to_reference"].tolist() == [0.0] * 30


def test_only_items_that_ask_run_the_reference_model(pair, monkeypatch):
    scorer, _, _ = pair
    calls = []
    forward = scorer.reference.hidden
    monkeypatch.setattr(scorer.reference, "hidden", lambda ids: calls.append(len(ids)) or forward(ids))
    scorer.score([TokenItem(tokens(5, 1), tokens(4, 2)), TokenItem(tokens(5, 1), tokens(6, 3))])
    assert calls == []
    scorer.score([TokenItem(tokens(5, 1), tokens(4, 2)), TokenItem(tokens(5, 1), tokens(6, 3), ("kl_to_reference",))])
    assert calls == [1]


def test_a_reference_model_of_another_vocabulary_is_refused(folder, tmp_path):
    bigger = make_tiny_model(tmp_path / "bigger", vocab_size=320)
    with pytest.raises(ValueError, match="its vocabulary has 320 entries, the scorer's 288"):
        TransformersScorer(str(folder), "float32", "cpu", reference_model=str(bigger))
    swapped = make_tiny_model(tmp_path / "swapped")
    file = swapped / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(
        ValueError, match=r"reference model .*swapped: its tokenizer has '[ab]' as id \d+, the scorer's"
    ):
        TransformersScorer(str(folder), "float32", "cpu", reference_model=str(swapped))
    with pytest.raises(ValueError, match="the reference model .*nowhere"):
        TransformersScorer(str(folder), "float32", "cpu", reference_model=str(tmp_path / "nowhere"))


def test_every_eos_that_the_model_names_ends_a_completion(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 40]}))
    scorer = TransformersScorer(str(tmp_path / "m"), "float32", "cpu")
    assert scorer.eos_ids == {EOS, 40}
    assert scorer.score([TokenItem([5], [6, 40, 7])])[0].n_tokens == 2


def test_start_up_errors_are_clear(tmp_path):
    with pytest.raises(ValueError, match="dtype: 'int4' is not one of float32, bfloat16"):
        TransformersScorer(str(tmp_path), "int4")


def test_a_cap_on_attention_scores_is_kept(tmp_path):
    from transformers import AutoModelForCausalLM

    make_capped_model(tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    prompt, completion = list(range(20, 40)), list(range(50, 70))
    (found,) = TransformersScorer(str(tmp_path), "float32", "cpu").score([TokenItem(prompt, completion)])
    wanted = model_oracle(oracle, prompt, completion)["self_certainty"]
    assert found.per_token["self_certainty"] == pytest.approx(wanted.numpy(), rel=1e-3, abs=1e-5)
