"""Conversion of trained ResNets to GeoPrior ResNets."""
