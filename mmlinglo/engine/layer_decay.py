# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Dict, List, Optional, Tuple, Union

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmlinglo.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Use smaller learning rates for layers closer to the input of the backbone.

    A parameter in layer ``depth`` of ``num_layers`` gets the learning rate
    ``lr * layer_decay_rate ** (num_layers - 1 - depth)``. The backbone's ``get_layer_depth``
    returns these two numbers. Parameters outside the backbone get the full rate.

    mmpretrain's ``LearningRateDecayOptimWrapperConstructor`` has the same rule. This one also
    works for detectors and segmentors. All options of mmengine's default constructor keep
    working; ``lr_mult`` and ``bias_lr_mult`` multiply the layer's rate.

    The paper does not use this: it trains all layers with one rate.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper; its optimizer must
            state ``lr``.
        paramwise_cfg: Options of the default constructor, and
            ``layer_decay_rate``, in (0, 1].

    Raises:
        ValueError: If ``lr`` or ``layer_decay_rate`` is missing, or the latter
            is out of range.

    Example:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='mmlinglo.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.9, norm_decay_mult=0.0),
        ... )
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate must be a number in (0, 1], got {rate!r}: '
                'set it, or leave out this constructor'
            )
        if self.base_lr is None:
            raise ValueError('layer-wise learning rates start from optimizer.lr: set it')
        self.layer_decay_rate = rate

    def add_params(
        self,
        params: List[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: Optional[Union[int, float]] = None,
    ) -> None:
        """Add the parameters of a module to the groups, and scale their learning rates.

        Args:
            params: Parameter groups, extended in place.
            module: The whole model, or one of its parts when the default
                constructor calls this for each child.
            prefix: Name of ``module`` in the model.
            is_dcn_module: See the default constructor.

        Raises:
            ValueError: If no part of the model has the method ``get_layer_depth``.
        """
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        if prefix:
            return  # only part of the model; the last call has the prefix '' and all groups
        backbones = _find_backbones(module)
        names = {parameter: name for name, parameter in module.named_parameters()}
        rates: Dict[Tuple[int, int], float] = {}
        for group in params:
            name = names[group['params'][0]]
            backbone = next((b for b in backbones if name.startswith(b)), None)
            if backbone is None:
                continue
            depth, num_layers = backbones[backbone].get_layer_depth(name, backbone)
            scale = self.layer_decay_rate ** (num_layers - 1 - depth)
            group['lr'] = group.get('lr', self.base_lr) * scale
            rates[depth, num_layers] = self.base_lr * scale
        for (depth, num_layers), rate in sorted(rates.items()):
            print_log(
                f'lr of layer {depth} (the last is {num_layers - 1}): {rate:.3g}', logger='current'
            )


def _find_backbones(model: nn.Module) -> Dict[str, nn.Module]:
    """Find the modules that know the depths of their parameters, by prefix."""
    backbones = {
        f'{name}.' if name else '': module
        for name, module in model.named_modules()
        # mmpretrain's classifiers have the method too, but only pass it on to their backbone
        if hasattr(module, 'get_layer_depth') and not hasattr(module, 'backbone')
    }
    if not backbones:
        raise ValueError(
            'layer-wise learning rates need a backbone with get_layer_depth, such as LinGlo: '
            f'this {type(model).__name__} has none'
        )
    return backbones
