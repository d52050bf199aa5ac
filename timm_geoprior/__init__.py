"""GeoPrior ResNets for timm: importing this package registers `geoprior_resnet*` in timm's model registry."""
from .geoprior_resnet import GeoPriorBottleneck, GeoPriorResNet
from .layers import GeoPriorAttn2d, GeoPriorConv2d

__version__ = '0.1.0'

__all__ = ['GeoPriorAttn2d', 'GeoPriorBottleneck', 'GeoPriorConv2d', 'GeoPriorResNet']
