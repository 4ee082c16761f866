"""One log line for each group in every service it passes, so that it can be followed through all of them by its id.

In JSON logs the line has the fields `group_id`, `weight_version` (which made the group) and what else is known; in logs
for people there are none of these lines, but with RLIF_LOG_LEVEL=DEBUG.
"""

import logging

log = logging.getLogger("rlif.groups")

FIELDS = ("group_id", "index", "spec_id", "step", "weight_version", "scorer_weight_version")


def note(what: str, group_id: str, **fields: object) -> None:
    """`fields` are of `FIELDS`; those without a value are left out."""
    log.info("group %s %s", group_id, what, extra={"group_id": group_id, **fields})
