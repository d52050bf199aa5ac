"""Weights: what there are, and how they are loaded.

manifest  weights_manifest.json: tags, hashes, figures
cfgs      timm's and the Hub's configurations of each tag, the converted ones among them
download  a tag's files, from the package, the cache or the Hub, checked against the manifest
loading   verified bytes become a model's tensors
verify    `timm-geoprior verify` and `doctor`
"""
