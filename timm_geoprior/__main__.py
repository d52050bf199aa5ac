"""`python -m timm_geoprior`."""
import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
