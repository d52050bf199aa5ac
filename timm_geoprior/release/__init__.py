"""Releasing weights: model cards and publishing to the Hugging Face Hub."""
