"""GeoPrior ResNets for timm: importing this package registers `geoprior_resnet*` in timm's model registry.

The import takes a millisecond: if timm is not imported yet, the models are registered as soon as it is.

Examples:
    >>> import timm, timm_geoprior
    >>> model = timm.create_model('geoprior_resnet14_nano', num_classes=10)
"""
from importlib import import_module

from .registration import register_with_timm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .geoprior_resnet import GeoPriorBottleneck, GeoPriorResNet
    from .layers import GeoPriorAttn2d, GeoPriorConv2d

__version__ = '0.1.0'

__all__ = ['GeoPriorAttn2d', 'GeoPriorBottleneck', 'GeoPriorConv2d', 'GeoPriorResNet']

_MODULES = {
    'GeoPriorAttn2d': 'layers', 'GeoPriorConv2d': 'layers',
    'GeoPriorBottleneck': 'geoprior_resnet', 'GeoPriorResNet': 'geoprior_resnet'}


def __getattr__(name: str) -> object:
    """Import the public classes and their modules lazily (PEP 562)."""
    if name in _MODULES:
        return getattr(import_module(f'.{_MODULES[name]}', __name__), name)
    if name in _MODULES.values():
        return import_module(f'.{name}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES.values()})


register_with_timm()
