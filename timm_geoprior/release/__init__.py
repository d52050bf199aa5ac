"""Releasing weights.

staging    from a checkpoint to the folder that is the Hub repository before it is one
releasing  a staged folder goes into the package, or onto the Hub
publish    the command
cards      model cards and the README's tables, from the manifest
pin        the converted tags' sources: their hashes, and the figures that timm has published
"""
