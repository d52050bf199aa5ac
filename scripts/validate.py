"""Measure a model's accuracy: `python scripts/validate.py --help`. The same as `timm-geoprior validate`."""
import sys

try:
    from timm_geoprior.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"validate.py: {error.name} is not installed. Run `pip install -e '.[train]'`.")

if __name__ == '__main__':
    sys.exit(main(['validate', *sys.argv[1:]], 'validate.py'))
