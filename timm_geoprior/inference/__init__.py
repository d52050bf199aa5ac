"""Trained networks for people with pictures.

classifier  pictures in, names and probabilities out
inputs      the pictures that a command is given: files, folders, patterns, the sample photograph
windows     where each attention layer looks from a point of a picture
explain     windows, Grad-CAM and effective receptive field on one page
demo        a page to try the models on, and its folder for a Hugging Face Space
"""
