"""Train a model by a recipe: `python scripts/train.py --help`. The same as `timm-geoprior train`."""
import sys

try:
    from timm_geoprior.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"train.py: {error.name} is not installed. Run `pip install -e '.[train]'`.")

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]], 'train.py'))
