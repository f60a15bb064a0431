# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Any, Tuple

from mmdet.models.layers import SELayer
from mmdet.registry import MODELS
from torch import Tensor, nn

from mmlinglo import LinGlo


@MODELS.register_module()
class GatedLinGlo(LinGlo):
    """LinGlo with a squeeze-and-excitation gate on each of its feature maps.

    Args:
        ratio: Reduction of the channels inside the gates.
        args, kwargs: As for LinGlo.
    """

    def __init__(self, *args: Any, ratio: int = 4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        widths = [self.arch['embed_dims'][i] for i in self.out_indices]
        self.gates = nn.ModuleList(SELayer(width, ratio) for width in widths)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Map images (B, 3, H, W) to the same maps as LinGlo, each (B, C, H / s, W / s)."""
        return tuple(gate(feature) for gate, feature in zip(self.gates, super().forward(x)))
