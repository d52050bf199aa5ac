"""Exact evaluation: every image counted once, as integers, whatever the batch size and the number of processes.

In the order in which `timm-geoprior validate` goes through them:

- `validate.py`: the command, its arguments and exit code;
- `measure.py`: one model after the other; it compares what was measured with the manifest;
- `models.py`: a tag, any model of timm or a checkpoint becomes a network with weights and class names;
- `classes.py`: which class of the data is which class of the model;
- `evaluate.py`: the pass over the images, in one or several precisions and processes;
- `metrics.py`: what is read off the scores, and where a new metric belongs;
- `results.py`: lines for people, JSON, CSV and plots.
"""
