"""Data sets made ready to train on: `rlif data prepare` (docs/data.md)."""
