"""How long the parts of bringing new weights to a server take: one metric for both sides."""

from prometheus_client import Histogram

SECONDS = Histogram(
    "rlif_weight_sync_seconds",
    "Time of a phase of bringing new weights to a server: write or stage, announce, send (trainer); verify, patch or "
    "merge, then load (servers), and parts of load: pause, meet (for a broadcast), swap, resume (rollout)",
    ["service", "phase"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
