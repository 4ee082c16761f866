"""Logprobs and entropies through tiles against all logits in float64."""

import pytest
import torch
from scored_groups import make_groups, token_logprobs, trained_pairs
from tiny import make_capped_model, make_tiny_model

from services import recipe
from services.recipe import Model, RecipeError
from trainer import policy as policies
from trainer import reference as references
from trainer.batch import deal, micro_batch, sequences
from trainer.ranks import Ranks


@pytest.fixture(scope="module", params=["tied", "untied", "capped"])
def folder(request, tiny_model, tmp_path_factory):
    if request.param == "tied":
        return tiny_model
    if request.param == "capped":
        return make_capped_model(tmp_path_factory.mktemp("capped"))
    return make_tiny_model(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.mark.parametrize("tile_elements", [1, 700, 10_000_000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropies_equal_the_full_logits(folder, tile_elements, temperature):
    from transformers import AutoModelForCausalLM

    groups = make_groups(3, seed=5, temperature=temperature)
    batch = sequences(groups, 288)
    policy = policies.load(Model(path=str(folder), dtype="float32"))
    policy.head.tile_elements = tile_elements
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    (share,) = deal(batch, 1, 60)
    pairs = list(trained_pairs(groups))
    for indices in share:
        micro = micro_batch(batch, indices, "per_sequence")
        logprobs, entropies = policy(micro.packed, micro.positions, micro.targets, micro.temperatures)
        expected = [
            token_logprobs(plain, pairs[i][0].prompt_token_ids, pairs[i][1].token_ids, temperature) for i in indices
        ]
        assert torch.allclose(logprobs.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
        for place, index in enumerate(indices):
            prompt, answer = pairs[index][0].prompt_token_ids, pairs[index][1].token_ids
            rows = plain(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
            p = rows.softmax(-1)
            start = sum(len(pairs[i][1].token_ids) for i in indices[:place])
            got = entropies[start : start + len(answer)]
            assert torch.allclose(got.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)


def test_tiles_do_not_change_the_gradient(tiny_model):
    batch = sequences(make_groups(2, seed=1), 288)
    micro = micro_batch(batch, deal(batch, 1, 10_000)[0][0], "per_sequence")
    grads = []
    for tile_elements in (300, 10_000_000):
        policy = policies.load(Model(path=str(tiny_model), dtype="float32"))
        policy.head.tile_elements = tile_elements
        logprobs, _ = policy(micro.packed, micro.positions, micro.targets, micro.temperatures)
        (logprobs * micro.weights).sum().backward()
        grads.append({name: p.grad for name, p in policy.named_parameters()})
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-7), name


def test_tensors_have_hugging_face_names_once(folder):
    from transformers import AutoModelForCausalLM

    policy = policies.load(Model(path=str(folder), dtype="float32"))
    names = dict(policies.tensors(policy, partitioned=False))
    assert set(names) == set(dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()))


def test_the_reference_is_frozen(tiny_model):
    policy = policies.reference(Model(path=str(tiny_model), dtype="float32"))
    assert not any(p.requires_grad for p in policy.parameters()) and not policy.training


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_a_moving_reference_begins_where_training_does(tiny_model, tmp_path, kind):
    """With --resume-from it is the folder's weights; a frozen one stays the recipe's model."""
    begun = Model(path=str(make_tiny_model(tmp_path / "begun", seed=1)), dtype="float32")
    keys = {"steps": 1, "groups_per_step": 1, "kl_beta": 0.1, "zero_stage": 0, "reference": {"kind": kind}}
    made = {"run": {"name": "r", "dir": "r"}, "model": {"path": str(tiny_model), "dtype": "float32"}}
    chosen = recipe.parse(
        {**made, "data": {"path": "d", "fields": {"prompt": "p"}}, "rewards": "intuitor", "trainer": keys}
    )
    reference = references.start(chosen, Ranks(0, 1, torch.device("cpu")), policies.load(begun), begun)
    assert reference is not None
    wanted = policies.load(begun if kind == "ema" else chosen.model)
    for found, expected in zip(reference.module.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_missing_model_is_refused_by_key(tmp_path):
    with pytest.raises(RecipeError, match="model.path.*nowhere"):
        policies.load(Model(path=str(tmp_path / "nowhere")))
