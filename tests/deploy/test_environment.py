"""Every RLIF_ variable that the code reads is one that docs/operations.md tells of, and is where it says it is."""

import re

from composition import ROOT, composed, ours
from manifests import CASES, containers, merged, part, pods, render, secret

PACKAGES = ("services", "reward_server", "rollout_server", "trainer")
INTERNAL = {
    "RLIF_ATTEMPT": "of a job's script to its nodes",
    "RLIF_NODE_ADDRESSES": "of a job's script to its nodes",
    "RLIF_VLLM": "of a server to its engine's processes",
    "RLIF_VLLM_SCORER": "of a server to its engine's processes",
}

WITH_EXTRAS = ("rollout", "reward", "sandbox", "orchestrator", "trainer")


def read_by_the_code() -> set[str]:
    texts = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {name for text in texts for name in re.findall(r"\"(RLIF_[A-Z_]+)\"", text)}


def told() -> dict[str, tuple[str, ...]]:
    """The table of docs/operations.md: variable -> (what for, in compose, in the chart)."""
    text = (ROOT / "docs/operations.md").read_text().partition("## Environment variables")[2].partition("\n## ")[0]
    return {row[0]: row[1:] for row in re.findall(r"^\| `([A-Z0-9_.]+)` \| (.+?) \| (.+?) \| (.+?) \|$", text, re.M)}


def test_every_variable_is_told_of():
    found = {name for name in read_by_the_code() if name != "RLIF_KEY_"}
    assert len(found) > 10
    assert found - INTERNAL.keys() == {name for name in told() if name.startswith("RLIF_") and "..." not in name}
    assert "RLIF_KEY_..." in told()
    for name in INTERNAL:
        assert name in read_by_the_code(), f"{name} is read no more"


def test_compose_and_the_chart_set_what_the_table_says():
    in_compose = {name for service in ours(composed()).values() for name in service.get("environment", {})}
    in_chart = {
        variable["name"]
        for case in CASES.values()
        for _, template in pods(render(merged(case, {name: {"extraEnv": []} for name in WITH_EXTRAS})))
        for container in containers(template)
        for variable in container.get("env", [])
    }
    for name, (_, compose, chart) in told().items():
        assert (compose == "`.env`") == (name in in_compose), name
        assert (chart == "set") == (name in in_chart), name


def test_the_chart_hands_a_variable_to_the_part_it_is_for():
    for own in WITH_EXTRAS:
        values = merged(CASES["everything"], {own: {"extraEnv": secret("RLIF_KEY_MINE", "mine")}})
        have = {
            part(template)
            for _, template in pods(render(values))
            for variable in template["spec"]["containers"][0].get("env", [])
            if variable["name"] == "RLIF_KEY_MINE"
        }
        assert have == {own}
