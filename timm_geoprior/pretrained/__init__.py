"""Weights: the manifest, timm's configurations, verified loading and downloading."""
