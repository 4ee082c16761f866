"""Weight versions: `publish` (trainer), `follow` (servers), `pointer` (what redis knows of them), `disk` (their files),
`delta` (what changed since the version before), `adapter` (low-rank adapters) and `mirror` (the copy that deltas are
made against and applied to, and adapters are merged in). `store` says where all of it lies.

`pointer`, `store` and `follow` import no torch; the others do.
"""
