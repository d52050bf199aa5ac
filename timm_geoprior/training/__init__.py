"""Training: a recipe in, a run folder out. `scripts/train.py` is its command line."""
