"""The parts of the objective, one pure function each; trainer/loss.py puts them together."""
