"""docs/operations.md answers every alert, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "operations.md").read_text()
RULES = yaml.safe_load((ROOT / "k8s" / "rlif" / "files" / "alerts" / "rlif.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_its_section(name):
    file, _, anchor = ALERTS[name]["annotations"]["runbook_url"].partition("#")
    assert file == "docs/operations.md" and anchor in anchors(GUIDE)


def test_every_section_is_of_an_alert_that_exists():
    wanted = {rule["annotations"]["runbook_url"].partition("#")[2] for rule in ALERTS.values()}
    assert {anchor for anchor in anchors(GUIDE) if anchor.startswith("alert-")} == wanted


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / "docs" / page).read_text()):
        file, _, anchor = target.partition("#")
        there = ROOT / "docs" / (file or page)
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            text = there.read_text()
            assert anchor in anchors(text) or f'id="{anchor}"' in text, target
