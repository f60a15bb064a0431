# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Parameters and multiply-adds of a model, counted by torch's flop counter.

A multiply-add is one pair of numbers multiplied in a matrix product or a convolution (torch counts
two operations for it); biases, norms and activations are not counted. LinGlo is counted as the paper
writes it, under :func:`mmlinglo.literal`, so no count depends on a device or a tuned threshold.
"""

import copy
import math
from collections import Counter
from contextlib import nullcontext
from types import MethodType
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

import mmlinglo
from mmlinglo.utils.deploy import count_input_channels, stop_masking_padding, switch_to_deploy

# Operators without a product, besides views and those that torch marks as pointwise or reduction.
NO_PRODUCTS = frozenset(
    'softmax safe_softmax log_softmax layer_norm group_norm batch_norm batch_norm_legit '
    'batch_norm_legit_no_training sum mean prod amax amin cumsum linalg_vector_norm '
    'adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d max_pool2d_with_indices '
    'upsample_bilinear2d upsample_bicubic2d upsample_nearest2d prelu_kernel hardswish '
    'contiguous to_copy lift_fresh cat stack flip roll repeat constant_pad_nd im2col '
    'pixel_shuffle unsafe_view index index_select index_put gather scatter masked_fill arange '
    'empty empty_like empty_strided fill full full_like linspace ones ones_like zeros zeros_like '
    'new_empty new_full new_ones new_zeros scalar_tensor device as_strided '
    'floor_divide local_scalar_dense grid_sampler_2d max topk'.split()
)


class Complexity(NamedTuple):
    """Parameters of each part of a model, and multiply-adds of each operator in each part."""

    parameters: Dict[str, int]
    operators: Dict[str, Dict[str, int]]

    @property
    def params(self) -> int:
        return sum(self.parameters.values())

    @property
    def macs(self) -> int:
        return sum(sum(part.values()) for part in self.operators.values())


class _Counter(TorchDispatchMode):
    """Counts multiply-adds by part of the model and by operator.

    It raises a ValueError for an operator that may be a product without a formula in torch.
    """

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.operators: Dict[str, Counter] = {}

    def __torch_dispatch__(self, func: Any, _: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        stem = name.strip('_').removeprefix('native_')
        harmless = func.is_view or torch.Tag.pointwise in func.tags or stem in NO_PRODUCTS
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            # Such as 'Detector.neck.conv': a toolbox may call the forward of a part, which is not seen.
            parts = sorted(path.split('.')[1] for path in self.tracker.parents if '.' in path)
            part = self.operators.setdefault(parts[0] if parts else 'other', Counter())
            part[name] += flops // 2
        elif not harmless or func.namespace not in ('aten', 'prim'):
            raise ValueError(
                f'the operator {func} cannot be counted: torch has no formula for it. If it '
                f'multiplies nothing, add it to {__name__}.NO_PRODUCTS'
            )
        return out


def count_complexity(
    model: nn.Module, *args: Any, on_zeros: bool = False, **kwargs: Any
) -> Complexity:
    """Count parameters and multiply-adds of one forward pass, in the mode that the model is in.

    The pass runs on tensors without data and leaves the model as it is. Parts are the model's direct
    children, and 'other'. Attention counts as the two products of its definition.

    Args:
        model: The model.
        args: Arguments of the pass.
        on_zeros: Whether to run on zeros instead, for a model that reads values but executes the same whatever
            they are. It takes the time and memory of the pass.
        kwargs: Further arguments of the pass.

    Raises:
        ValueError: If an operator may be a product that torch does not count, or what is executed
            depends on a tensor's values.
    """
    # The weights too: an in-place change of a real tensor would be carried out.
    tensors = ({**dict(model.named_parameters()), **dict(model.named_buffers())}, args, kwargs)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    mode, replace = (nullcontext(), torch.zeros_like) if on_zeros else (fake, fake.from_tensor)
    with mmlinglo.literal(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), mode:
        with ModuleTracker() as tracker, _Counter(tracker) as counter:
            try:
                functional_call(model, *tree_map_only(Tensor, replace, tensors))
            except RuntimeError as error:
                raise ValueError(f'the forward pass fails without data: {error}') from error
    operators = counter.operators
    operators['other'] = operators.pop('other', Counter())  # the last
    parameters = Counter(dict.fromkeys(operators, 0))
    for name, parameter in model.named_parameters():
        part = name.split('.')[0]
        parameters[part if part in operators else 'other'] += parameter.numel()
    return Complexity(dict(parameters), {part: dict(found) for part, found in operators.items()})


def count_forms(model: nn.Module, shape: Tuple[int, int]) -> Dict[str, Complexity]:
    """Complexity of a toolbox's model for one image: ``training`` form (as evaluated) and ``deployed``.

    A two-stage detector is counted for the most regions that its ``test_cfg`` lets through:
    ``rpn.max_per_img`` for boxes, ``rcnn.max_per_img`` for masks; RoIAlign is not counted.

    Args:
        model: A classifier, detector or segmentor in evaluation mode.
        shape: Height and width in pixels of the image that enters the backbone.

    Raises:
        ValueError: See :func:`count_complexity`.
    """
    image = torch.empty(1, count_input_channels(model), *shape)
    forms = dict(training=copy.deepcopy(model), deployed=copy.deepcopy(model))
    switch_to_deploy(forms['deployed'])
    for twin in forms.values():
        stop_masking_padding(twin)
        if hasattr(twin, 'roi_head'):
            twin.forward = MethodType(_forward_with_most_regions, twin)
    sizes = dict.fromkeys(('batch_input_shape', 'img_shape', 'ori_shape'), shape)
    sample = BaseDataElement(metainfo=sizes)
    # Deformable attention compares the sizes of the maps, which are tensors there.
    on_zeros = hasattr(model, 'decoder') or hasattr(model, 'panoptic_head')
    return {
        form: count_complexity(twin, image, on_zeros=on_zeros, mode='tensor', data_samples=[sample])
        for form, twin in forms.items()
    }


def _forward_with_most_regions(self: Any, images: Tensor, **_: Any) -> Tuple[Any, ...]:
    """Pass of a two-stage detector of mmdet with empty regions in the place of the ones it finds."""
    features, roi_head = self.extract_feat(images), self.roi_head
    stages = [(roi_head.bbox_roi_extractor, roi_head.bbox_head, self.test_cfg.rpn.max_per_img)]
    if roi_head.with_mask:
        extractor, number = roi_head.mask_roi_extractor, self.test_cfg.rcnn.max_per_img
        stages.append((extractor, roi_head.mask_head, number))
    outputs = [self.rpn_head(features)]
    for extractors, heads, number in stages:
        several = isinstance(heads, nn.ModuleList)  # Cascade R-CNN
        for extractor, head in zip(extractors, heads) if several else [(extractors, heads)]:
            size = extractor.roi_layers[0].output_size
            outputs.append(head(images.new_zeros(number, extractor.out_channels, *size)))
    return tuple(outputs)


def image_shape(cfg: Config) -> Tuple[int, int]:
    """Height and width in pixels at which an experiment's complexity is stated.

    The crop of a segmentor's training, as in the literature; of a classifier or detector what its
    test pipeline makes of an image of the shape of its ``Resize``.

    Raises:
        ValueError: If the config sets no such size.
    """
    size = None
    if cfg.default_scope == 'mmseg':
        size = (cfg.model.get('data_preprocessor') or {}).get('size')
    else:
        dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
        for step in dataset.get('pipeline', ()):
            name = step.type if isinstance(step.type, str) else step.type.__name__
            if name.endswith('CenterCrop'):
                size = step.crop_size
            elif name.endswith('Resize') and 'scale' in step:
                size = step.scale if isinstance(step.scale, int) else step.scale[::-1]
    if size is None:
        raise ValueError('the config sets no fixed size for test images, so give one (--shape)')
    return (size, size) if isinstance(size, int) else tuple(size)


def padded_shape(model: nn.Module, shape: Sequence[int]) -> Tuple[int, int]:
    """Height and width in pixels to which the model's data preprocessor pads an image of ``shape``."""
    return pad(shape, getattr(model.data_preprocessor, 'pad_size_divisor', 1))


def pad(shape: Sequence[int], divisor: int = 32) -> Tuple[int, int]:
    """Pad a height and width to multiples, such as 800 x 1333 to 800 x 1344 for detection."""
    height, width = (math.ceil(length / divisor) * divisor for length in shape)
    return height, width


def complexity_rows(forms: Dict[str, Complexity]) -> List[dict]:
    """One dict for each form, part and operator, also 'all' operators and the part 'total', for a report.

    ``macs_g`` is in 10^9; ``params_m`` in 10^6 stands where the operator is 'all'.
    """
    rows = []
    for form, found in forms.items():
        params = dict(found.parameters, total=found.params)
        total = sum(map(Counter, found.operators.values()), Counter())
        for part, macs in dict(found.operators, total=total).items():
            row, macs_g = dict(form=form, part=part), sum(macs.values()) / 1e9
            rows.append(dict(row, operator='all', params_m=params[part] / 1e6, macs_g=macs_g))
            rows += [dict(row, operator=name, macs_g=macs[name] / 1e9) for name in macs]
    return rows
