"""Weight versions: `publish` (trainer), `follow` (servers), `pointer` (what redis knows of them), `disk` (their files),
`delta` (what changed since the version before), `adapter` (low-rank adapters) and `mirror` (the copy that deltas are
made against and applied to, and adapters are merged in). `store` says where all of it lies.

Broadcasts: `broadcast` and `sender` (trainer), `meeting` (how the two sides meet over redis), `lines` and `buckets`
(what carries them), `vllm_server` and `vllm_worker` (the engine's end).

`pointer`, `store`, `meeting`, `follow` and `vllm_server` import no torch; the others do.
"""
