"""Which weights a model folder holds: a checksum of everything that decides what it says."""

from pathlib import Path

SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bin")
CHUNK = 2**24


def checksum(folder: Path) -> str:
    """xxh3-128 over names and bytes of weights, configuration, tokenizer and chat template."""
    import xxhash

    digest = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            digest.update(f"{path.name}\x1f{path.stat().st_size}\x1f".encode())
            with path.open("rb") as file:
                while part := file.read(CHUNK):
                    digest.update(part)
    return digest.hexdigest()
