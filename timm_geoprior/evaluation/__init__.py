"""Exact evaluation: every image is counted once, in integers, whatever the batch size and the number of processes.

The modules, in the order in which `timm-geoprior validate` uses them:

- `validate.py`: the command, its arguments and exit code;
- `measure.py`: measures one model after the other, and compares the results with the manifest;
- `models.py`: loads a tag, any model of timm or a checkpoint, with weights and class names;
- `classes.py`: matches the classes of the data with those of the model;
- `evaluate.py`: the pass over the images, in one or several precisions and processes;
- `metrics.py`: metrics computed from the scores; add new ones here;
- `results.py`: text, JSON, CSV and plots.
"""
