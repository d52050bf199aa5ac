"""Releasing weights.

staging    from a checkpoint to a folder with the content of the Hub repository
releasing  from a staged folder into the package, or onto the Hub
publish    the command
cards      model cards and the README's tables, from the manifest
pin        the sources of converted tags: their hashes, and the figures that timm has published
"""
