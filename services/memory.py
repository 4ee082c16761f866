"""How much memory one rank of the trainer needs on its GPU: an estimate from `config.json` alone, without torch.

Fixed parts follow what DeepSpeed keeps at each ZeRO stage; activations follow what a gated decoder layer saves for its
backward pass. `docs/training.md` has the formulas, and what was measured against them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from services.recipe import Model, Recipe, RecipeError, parse

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduction buffer, as trainer/engine.py sets it, where the model has as many."""
LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO stage 3 keeps for what comes next (its default)."""
TILE = 2**26
"""Logits held at a time on a GPU, as trainer/head.py has it."""
CUDA = int(1.5 * GIB)
"""What CUDA, its libraries and the allocator's rounding take of a GPU: an allowance."""


@dataclass(frozen=True)
class Shape:
    """Of a decoder with gated MLPs (Llama, Qwen, Mistral, Gemma ...), from its config.json."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    intermediate: int
    tied: bool

    @property
    def query(self) -> int:
        return self.heads * self.head_width

    @property
    def key(self) -> int:
        return self.key_heads * self.head_width

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's linear modules."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key),
            "v_proj": (self.hidden, self.key),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """Without biases, which are few."""
        layer = sum(inputs * outputs for inputs, outputs in self.linears.values()) + 2 * self.hidden
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    def adapters(self, rank: int, targets: list[str]) -> int:
        sizes = (sum(self.linears[target]) for target in targets if target in self.linears)
        return self.layers * rank * sum(sizes)


@dataclass(frozen=True)
class Need:
    """Bytes on one rank's GPU."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    reference: int
    activations: int
    head: int
    cuda: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def shape(model: Model) -> Shape:
    """Raises RecipeError: the model has no config.json on this machine, or is no decoder with gated MLPs."""
    path = _config_file(model)
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    if config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts"):
        raise RecipeError(f"model.path: {model.path!r} is a mixture of experts, for which there is no memory estimate")
    try:
        heads = config["num_attention_heads"]
        return Shape(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise RecipeError(f"model.path: {path} has no {error}, without which memory cannot be estimated") from error


def _config_file(model: Model) -> Path:
    """In the model's folder, or where the Hugging Face hub's client keeps what it has fetched."""
    path = Path(model.path).expanduser() / "config.json"
    if path.exists():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except (ImportError, ValueError):
        cached = None
    if isinstance(cached, str):
        return Path(cached)
    raise RecipeError(
        f"model.path: no config.json of {model.path!r} on this machine to estimate memory from; "
        "fetch the model first, or give its folder"
    )


def need(recipe: Recipe, model: Shape, overlaps: bool = True) -> Need:
    """What one rank of the trainer needs at its worst moment, a step's last backward pass, which the reduction of
    gradients `overlaps` on a GPU."""
    trainer, size = recipe.trainer, BYTES[recipe.model.dtype]
    ranks, stage, lora = trainer.ranks, trainer.zero_stage, recipe.model.lora
    whole = model.parameters
    learned = whole if lora is None else model.adapters(lora.rank, lora.targets)
    held = whole if lora is None else whole + learned

    def share(elements: int, from_stage: int) -> int:
        return -(-elements // ranks) if stage >= from_stage else elements

    weights = size * share(held, 3)
    if trainer.offload.parameters:
        weights = 0
    # Adam's two states, and from stage 1 on a float32 copy of the weights.
    optimizer = 8 * share(learned, 1) + (4 * share(learned, 1) if stage >= 1 else 0)
    # Stage 0 and 1 keep every gradient, the others the part that this rank's optimizer needs, in float32.
    gradients = 4 * share(learned, 2)
    if trainer.offload.optimizer:
        optimizer = 0
        gradients = 0 if stage >= 2 else gradients
    bucket = min(BUCKET, learned)
    buffers = bucket * _reduction(stage, size, overlaps)
    if stage == 3:
        buffers += size * min(LIVE, whole)
    reference = size * share(whole, 3) if trainer.kl_beta > 0 and lora is None else 0
    if reference and trainer.reference.kind == "ema":
        reference += 4 * share(whole, 3)
    if trainer.reference.offload:
        # Below stage 3 it visits the GPU as a whole, before the first backward pass.
        reference = 0
    tokens, in_loss = _tokens(recipe)
    head = 3 * 4 * min(TILE, in_loss * model.vocab) + 2 * (size + 4) * in_loss * model.hidden
    if lora is None:
        head += size * model.vocab * model.hidden * (2 if model.tied else 1)
    activations = tokens * _per_token(model, size, trainer.gradient_checkpointing)
    return Need(weights, gradients, optimizer, buffers, reference, activations, head, CUDA)


def _reduction(stage: int, size: int, overlaps: bool) -> int:
    """Bytes that DeepSpeed holds for each element of a bucket of gradients while it reduces them."""
    if stage == 0:
        return 0
    if stage == 3:
        # In float32, and flattened once more by the rank that each part goes to.
        return 4 + 4
    # Stage 1 stages float32 sums. One bucket fills while the other is flattened and brought to float32 to be reduced.
    staged = 4 if stage == 1 else size
    return staged * (2 if overlaps else 1) + staged + (4 if staged < 4 else 0)


def _tokens(recipe: Recipe) -> tuple[int, int]:
    """Of the largest micro-batch: all, and those that are predicted. A sequence longer than the budget goes alone."""
    prompt, answer = recipe.data.max_prompt_tokens, recipe.rollout.sampling.max_tokens
    tokens = max(recipe.trainer.micro_batch_tokens, prompt + answer)
    return tokens, tokens


def _per_token(model: Shape, size: int, checkpointing: bool) -> int:
    """Bytes that the backward pass needs of a token's forward pass, in all layers."""
    # A norm keeps its input and its normalised input (both float32 where that is not the dtype) and its output.
    norm = 12 * model.hidden
    # Queries, keys, values, what attention makes of them, and that once more in the order the next layer wants.
    attention = size * (3 * model.query + 2 * model.key)
    # The gate before and after its activation, the other branch, their product.
    mlp = size * 4 * model.intermediate
    layer = 2 * norm + attention + mlp
    kept = size * model.hidden * model.layers + layer if checkpointing else layer * model.layers
    return kept + norm


def remedies(recipe: Recipe, limit: int, model: Shape) -> list[tuple[str, Need]]:
    """Settings to change, one after the other, until a rank needs at most `limit` bytes; (override, what is needed
    then). All that help where even together they are not enough."""
    done: list[tuple[str, Need]] = []
    overrides: list[str] = []
    tree = recipe.model_dump(mode="json")
    least = need(recipe, model)
    for override in _candidates(recipe):
        if least.total <= limit:
            break
        found = need(parse(tree, [*overrides, override]), model)
        if found.total < least.total:
            if done and done[-1][0].split("=")[0] == override.split("=")[0]:
                # A smaller value of the same key: the last one says it all.
                done.pop()
            overrides.append(override)
            least = found
            done.append((override, found))
    return done


def _candidates(recipe: Recipe) -> Iterator[str]:
    """From what costs nothing to what costs most."""
    trainer = recipe.trainer
    if trainer.ranks > 1:
        yield from (f"trainer.zero_stage={stage}" for stage in range(trainer.zero_stage + 1, 4) if stage >= 2)
    yield "trainer.gradient_checkpointing=true"
    longest = recipe.data.max_prompt_tokens + recipe.rollout.sampling.max_tokens
    tokens = trainer.micro_batch_tokens
    while tokens // 2 >= longest:
        tokens //= 2
        yield f"trainer.micro_batch_tokens={tokens}"
    if trainer.zero_stage > 0:
        yield "trainer.offload.optimizer=true"
    if recipe.model.lora is None:
        yield "model.lora={rank: 16}"
