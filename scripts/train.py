#!/usr/bin/env python3
"""Train a model by a recipe: `python scripts/train.py --help`."""
import sys

try:
    from timm_geoprior.training.train import main
except ModuleNotFoundError as error:
    sys.exit(f"train.py: {error.name} is not installed. Run `pip install -e '.[train]'`.")

if __name__ == '__main__':
    sys.exit(main())
