"""Weight versions: `publish` (trainer), `follow` (servers), `pointer` (what redis knows of them), `disk` (their files),
`delta` (what changed since the version before) and `mirror` (the copy that deltas are made against and applied to).

Broadcasts: `broadcast` and `sender` (trainer), `meeting` (how the two sides meet over redis), `lines` and `buckets`
(what carries them), `vllm_server` and `vllm_worker` (the engine's end).

`pointer`, `meeting`, `follow` and `vllm_server` import no torch; the others do.
"""
