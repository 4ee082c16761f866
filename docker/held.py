"""Constraints for pip: what is installed here stays, constraints.txt pins the rest. In an image of vLLM or PyTorch that
leaves everything as its makers tested it.

    python3 held.py constraints.txt > held.txt
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[\w.]+)?")
"""What pip accepts; Ubuntu's own packages have other versions, and are none that rlif needs."""

TOOLS = ("pip", "setuptools", "wheel")
"""What a fresh virtual environment brings, to install with: no version of it was chosen by anybody."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def held(constraints: str, installed: dict[str, str]) -> list[str]:
    """Lines `name==version`. `installed`: versions by name."""
    lines = [line.partition("#")[0].strip() for line in constraints.splitlines()]
    pinned = {canonical(line.partition("==")[0]): line for line in lines if line}
    here = {canonical(name): f"{name}=={version}" for name, version in installed.items() if VERSION.fullmatch(version)}
    return sorted(line for name, line in {**pinned, **here}.items() if name not in TOOLS)


if __name__ == "__main__":
    found = {distribution.name: distribution.version for distribution in distributions()}
    sys.stdout.write("\n".join(held(Path(sys.argv[1]).read_text(), found)) + "\n")
