"""Weight versions: `publish` (trainer), `follow` (servers), `pointer` (what redis knows of them), `disk` (their files),
`delta` (what changed since the version before) and `mirror` (the copy that deltas are made against and applied to).

`pointer` and `follow` import no torch; the others do.
"""
