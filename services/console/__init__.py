"""The console: a web page of a run while it learns - its numbers, its samples, its dead letters - and its controls.

All of it is read from the run's Redis, so it works beside the orchestrator (which serves it) and anywhere else. What
needs a model, a tokenizer or the rewards is asked of the run's reward server through `services.clients`.
"""
