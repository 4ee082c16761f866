"""Publishing a whole Hugging Face folder, or adapters to one, as a weight version, the way a trainer does."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from services.contract import Version
from services.recipe import Model
from services.recipe_sections import Lora
from services.weights.publish import Publisher
from trainer import lora
from trainer import policy as policies


def publish(publisher: Publisher, version: Version, folder: Path) -> Path:
    """Returns the published folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Path(publisher.publish(version, model.named_parameters(), config_dir=folder).location)


def publish_adapters(publisher: Publisher, version: Version, base: Path):
    """Of every linear layer, random ones; returns the model that they make of `base`, in float64."""
    settings = Model(path=str(base), dtype="float32", lora=Lora(rank=4, alpha=8))
    policy = policies.load(settings)
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith(lora.UP):
                parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.1)
    weights = publisher.publish(version, policies.adapters(policy, False), base, lora.published(policy.model, settings))
    assert weights.transport == "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    merged = model.load_state_dict(dict(policies.tensors(policy, False, settings.lora)), strict=False)
    assert not merged.unexpected_keys
    return model.double()
