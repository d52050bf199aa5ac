"""Images and their labels, for training, evaluation and conversion alike.

- `dataset.py`: `open_split` opens a folder, an archive, WebDataset shards, or a Hugging Face data set;
- `listing.py`: the folder of a split, the images in a folder or an archive, and the class of each;
- `preflight.py`: checks of a data set, before any time is spent on the network;
- `reading.py`: the one reader of images, which `classify` uses too;
- `batches.py`: what all loaders need (seeds, signals), and training batches from files;
- `memory.py`: training batches of small images that are held in memory.
"""
