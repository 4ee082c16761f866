"""Weight versions: `publish` (trainer), `follow` (servers), `pointer` (what redis knows of them), `disk` (their files).

`pointer` and `follow` import no torch; `disk` and `publish` do.
"""
