"""A run over several machines: one plan of who runs where, carried out by Slurm or by Ray."""
