# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy
from typing import Any, Iterator

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmlinglo.models.linglo import LinGlo

from .export import relative_error


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config on the CPU. It does not initialize or load weights."""
    init_default_scope(cfg.default_scope)
    model_cfg = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:
        model_cfg.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    return revert_sync_batchnorm(MODELS.build(model_cfg))


def has_deployed_form(model: nn.Module) -> bool:
    return any(hasattr(module, 'switch_to_deploy') for module in model.modules())


def switch_to_deploy(model: nn.Module) -> None:
    """Re-parameterise a classifier, detector or segmentor in place.

    Calls ``switch_to_deploy`` of every part that has it.

    Args:
        model: The model, in evaluation mode.

    Raises:
        RuntimeError: If a part is in training mode.
    """
    for module in list(model.modules()):
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()


def count_input_channels(model: nn.Module) -> int:
    """Channels of the images that a model takes: those of the backbone's first convolution."""
    layers = getattr(model, 'backbone', model).modules()
    return next((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), 3)


def stop_masking_padding(model: nn.Module) -> None:
    """Set ``mask_padding`` of LinGlo to False: for images without padding, the maps are the same."""
    for module in model.modules():
        if isinstance(module, LinGlo):
            module.mask_padding = False


@torch.no_grad()
def relative_difference(first: nn.Module, second: nn.Module, image_size: int = 128) -> float:
    """Compare the raw outputs of two models on the same two random images.

    The comparison runs on copies in float64. If the models compute the same function, only
    the rounding of their weights remains: about 1e-7 for float32.

    Args:
        first: A classifier, detector or segmentor in evaluation mode.
        second: Another one of the same kind.
        image_size: Height and width of the images in pixels.

    Returns:
        The largest absolute difference, divided by the largest absolute output of that tensor.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, count_input_channels(first), image_size, image_size)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    outputs = []
    for model in (first, second):
        twin = copy.deepcopy(model).double()
        stop_masking_padding(twin)
        outputs.append(list(_iterate_tensors(twin(images, mode='tensor'))))
    return relative_error(outputs[1], outputs[0])


def _iterate_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for item in output:
            yield from _iterate_tensors(item)
