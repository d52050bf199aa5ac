#!/usr/bin/env python3
"""Stage, bundle or publish a model's weights: `python scripts/publish.py --help`."""
import sys

try:
    from timm_geoprior.release.publish import main
except ModuleNotFoundError as error:
    sys.exit(f"publish.py: {error.name} is not installed. Run `pip install -e '.[train]'`.")

if __name__ == '__main__':
    sys.exit(main())
