"""Trained networks for people with pictures: classify, explain, a demo page."""
