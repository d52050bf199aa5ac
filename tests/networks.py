"""Networks in which every part affects the output, for tests that compare two ways to run the same network."""
import torch
from torch import nn

from timm_geoprior.layers import GeoPriorAttn2d


def randomize(model: nn.Module) -> nn.Module:
    """Randomize norms and radii: in a new network the residual branches are zero, and all radii are the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, 'running_var', None), torch.Tensor):
                for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_var, 0.5)):
                    if tensor is not None:
                        tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
            if isinstance(module, GeoPriorAttn2d):
                module.log_radius.copy_(torch.randn(module.log_radius.shape, generator=generator))
    return model


def attentions(model: nn.Module) -> list[GeoPriorAttn2d]:
    return [module for module in model.modules() if isinstance(module, GeoPriorAttn2d)]
