"""Trained ResNets made into GeoPrior ResNets."""
