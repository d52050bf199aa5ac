"""Registers the models in every Python process that a script under `timm-geoprior run` starts.

`run` puts this folder first on PYTHONPATH, which child processes inherit, and Python imports the first `sitecustomize`
that it finds at startup. The next one, the user's or the system's, then runs as if this one were not there.
"""
import os
import sys
from importlib import import_module

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_FOLDER))

sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _FOLDER]
sys.path.insert(0, _ROOT)  # the same package as the parent's, wherever that was found
try:
    import timm_geoprior  # noqa: F401
except Exception as error:  # in another Python, say, which may not need these models
    sys.stderr.write(f'timm-geoprior run: the models are not registered in process {os.getpid()} ({error}).\n')
finally:
    sys.path.remove(_ROOT)

_own = sys.modules.pop('sitecustomize')
try:
    import_module('sitecustomize')
except ModuleNotFoundError as error:
    if error.name != 'sitecustomize':
        raise
    sys.modules['sitecustomize'] = _own
