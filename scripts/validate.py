"""Measure a model's accuracy: `python scripts/validate.py --help`."""
import sys

try:
    from timm_geoprior.evaluation.validate import main
except ModuleNotFoundError as error:
    sys.exit(f"validate.py: {error.name} is not installed. Run `pip install -e '.[train]'`.")

if __name__ == '__main__':
    sys.exit(main())
