"""Publishing a whole Hugging Face folder as a weight version, the way a trainer does."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from services.contract import Version
from services.weights.publish import Publisher


def publish(publisher: Publisher, version: Version, folder: Path) -> Path:
    """Returns the published folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Path(publisher.publish(version, model.named_parameters(), config_dir=folder).location)
