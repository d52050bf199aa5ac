"""Pretrained weights: which ones exist, and how they are loaded.

manifest  weights_manifest.json: tags, hashes, measured results
cfgs      the configurations of each tag for timm and the Hub, including converted tags
download  a tag's files, from the package, the cache or the Hub, checked against the manifest
loading   verified bytes become a model's tensors
verify    `timm-geoprior verify` and `doctor`
"""
