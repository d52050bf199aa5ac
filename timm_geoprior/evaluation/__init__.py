"""Exact evaluation: every image counted once, as integers, whatever the batch size and the number of processes."""
from .accuracy import Counts, count_correct, target_ranks

__all__ = ['Counts', 'count_correct', 'target_ranks']
