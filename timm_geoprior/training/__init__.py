"""Training: a recipe in, a run folder out.

train       the command, which scripts/train.py runs too
recipe      what is trained, and where; the bundled recipes are in recipes/
parts       model, optimizer, schedule, loss and mixup of a recipe, by timm's factories
loaders     training batches, and held-out images to choose the best epoch by
engine      the loop, in one process or many
checkpoint  writing checkpoints, and the one reader of weights for every command
report      a line and a CSV row per epoch, curves
finetune    a folder of images in, a folder that timm loads out
recovery    a run that starts from a folder of `timm-geoprior convert`
"""
