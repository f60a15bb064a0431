# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from torch import nn


def init_layer(module: nn.Module) -> None:
    """Initialize a layer as PVT does, the paper's base; apply it to a network by ``apply``.

    Convolutions: normal by fan-out; norms: identity; biases: zeros; linear layers, saliency and
    position embeddings: truncated normal of standard deviation 0.02.
    """
    for name, param in module.named_parameters(recurse=False):
        if name == 'bias':
            nn.init.zeros_(param)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(param, std=(2 * module.groups / param[:, 0].numel()) ** 0.5)
        elif param.ndim == 1:  # the weight of a norm
            nn.init.ones_(param)
        else:
            nn.init.trunc_normal_(param, std=0.02)
