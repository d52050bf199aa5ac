"""Exact evaluation: every image counted once, as integers, whatever the batch size and the number of processes."""
