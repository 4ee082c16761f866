"""Which model a folder holds: a checksum of everything that decides what it says."""

from fnmatch import fnmatch
from pathlib import Path

DECIDES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin",
    "config.json", "generation_config.json",
    "tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*",
    "*.py",
)  # fmt: skip
"""Weights, configuration, tokenizer, chat template, code of the model's own. Reports may lie beside them."""
CHUNK = 2**24


def checksum(folder: Path) -> str:
    """xxh3-128 over names and bytes of these files, hex."""
    import xxhash

    digest = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in DECIDES):
            digest.update(f"{path.name}\x1f{path.stat().st_size}\x1f".encode())
            with path.open("rb") as file:
                while part := file.read(CHUNK):
                    digest.update(part)
    return digest.hexdigest()
