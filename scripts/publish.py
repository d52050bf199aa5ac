"""Stage, bundle or publish weights: `python scripts/publish.py --help`. The same as `timm-geoprior publish`."""
import sys

try:
    from timm_geoprior.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"publish.py: {error.name} is not installed. Run `pip install -e '.[train]'`.")

if __name__ == '__main__':
    sys.exit(main(['publish', *sys.argv[1:]], 'publish.py'))
