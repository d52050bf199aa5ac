"""Inference with trained networks.

classifier  class names and probabilities for pictures
inputs      the pictures given to a command: files, folders, patterns, the sample photograph
windows     where each attention layer looks from a point of a picture
explain     windows, Grad-CAM and the effective receptive field on one page
demo        a web page for trying the models, and its folder for a Hugging Face Space
"""
