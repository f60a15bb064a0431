# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Parameters and operations of a model, counted from the operators that it really executes.

mmengine's ``get_model_complexity_info`` gives an operator that it has no handle for
no operations and goes on; softmax, weighted sums, ``baddbmm`` and
``scaled_dot_product_attention`` are among them. Here such an operator is an error.

What is counted, in two separate sums:

- ``macs``: multiply-adds of matrix products (linear layers, attention and its
  weighted sums) and convolutions, one for each pair of numbers multiplied; biases are
  not counted. This is what the literature on backbones calls FLOPs. The formulas are
  those of ``torch.utils.flop_counter``, which counts two operations a multiply-add.
- ``elementwise``: operations of everything else. One for each element of the output
  of an addition, multiplication, division, activation and the like; one for each element of the
  input of a sum, mean or adaptive pooling; the window's size for each output of
  another pooling; 5 an element for a softmax (maximum, difference, exp, sum, division). Norms and
  bilinear interpolation as in mmengine: 5 an element with and 4 without learned scale for
  layer, group and instance norms, 2 and 1 for batch norms in evaluation, 4 for each
  output of a bilinear interpolation (16 bicubic).

Views, copies, padding, indexing, comparison, selection and tensor creation are free (:data:`FREE`).
"""

import copy
import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from mmlinglo.utils.deploy import switch_to_deploy

# Operators by their ATen names, without 'native' and without the underscores of private and in-place ones.
PRODUCTS = frozenset('mm addmm bmm baddbmm convolution'.split())
MATRIX_VECTOR = {'mv': 0, 'addmv': 1, 'dot': 0}  # position of the matrix among the arguments
ELEMENTWISE = frozenset(
    'add sub rsub mul div neg abs exp log sqrt rsqrt reciprocal pow clamp clamp_min clamp_max '
    'maximum minimum relu leaky_relu prelu_kernel elu gelu silu mish sigmoid hardsigmoid tanh '
    'hardtanh hardswish softplus erf sin cos'.split()
)
REDUCTIONS = frozenset(
    'sum mean prod amax amin cumsum linalg_vector_norm adaptive_avg_pool2d '
    'adaptive_max_pool2d'.split()
)
SOFTMAX = frozenset('softmax safe_softmax log_softmax'.split())
POOLING = frozenset('avg_pool2d max_pool2d_with_indices'.split())
INTERPOLATION = {'upsample_bilinear2d': 4, 'upsample_bicubic2d': 16}
NORMS = {  # position of the learned scale among the arguments
    'layer_norm': 2,
    'group_norm': 1,
    'batch_norm': 1,
    'batch_norm_legit': 1,
}
FREE = frozenset(
    'alias as_strided detach expand permute select slice split split_with_sizes squeeze t transpose '
    'unbind unfold unsqueeze unsafe_view view reshape_alias '  # views
    'clone contiguous copy to_copy lift_fresh cat stack flip roll repeat constant_pad_nd im2col '
    'pixel_shuffle upsample_nearest2d '  # copies
    'index index_select index_put gather scatter '  # indexing
    'eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not '
    'masked_fill where '  # comparison and selection
    'arange empty empty_like empty_strided fill full full_like linspace ones ones_like zeros '
    'zeros_like new_empty new_full new_ones new_zeros scalar_tensor '  # creation
    'device'.split()  # a query
)
UNKNOWN_RESULT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


class Count(NamedTuple):
    """Multiply-adds of products and convolutions, and operations of everything else."""

    macs: int = 0
    elementwise: int = 0

    def plus(self, other: 'Count') -> 'Count':
        return Count(self.macs + other.macs, self.elementwise + other.elementwise)


@dataclass(frozen=True)
class Complexity:
    """Parameters and operations of a model or of a part of it.

    Attributes:
        parameters: Parameters of each module itself, without its children, by
            the module's name. Shared ones are counted once.
        operations: Operations by the name of the innermost module that was being executed
            and the operator.
    """

    parameters: Dict[str, int]
    operations: Dict[Tuple[str, str], Count]

    @property
    def params(self) -> int:
        """Number of parameters."""
        return sum(self.parameters.values())

    @property
    def macs(self) -> int:
        """Multiply-adds of matrix products and convolutions."""
        return sum(count.macs for count in self.operations.values())

    @property
    def elementwise(self) -> int:
        """Operations of everything else."""
        return sum(count.elementwise for count in self.operations.values())

    def by_operator(self) -> Dict[str, Count]:
        """Operations by operator, those with most multiply-adds first."""
        total: Dict[str, Count] = {}
        for (_, operator), count in self.operations.items():
            total[operator] = total.get(operator, Count()).plus(count)
        return dict(sorted(total.items(), key=lambda item: item[1], reverse=True))

    def part(self, name: str) -> 'Complexity':
        """What belongs to the module ``name``, its children included."""
        return self._select(lambda module: f'{module}.'.startswith(f'{name}.'))

    def parts(self) -> Dict[str, 'Complexity']:
        """What belongs to each direct child, and under '' what the model does itself."""
        modules = [*(module for module, _ in self.operations), *self.parameters]
        names = dict.fromkeys(module.split('.')[0] for module in modules)
        parts = {name: self.part(name) for name in names if name}
        if '' in names:
            parts[''] = self._select(lambda module: module == '')
        return parts

    def _select(self, wanted: Callable[[str], bool]) -> 'Complexity':
        return Complexity(
            {name: number for name, number in self.parameters.items() if wanted(name)},
            {key: count for key, count in self.operations.items() if wanted(key[0])},
        )


def count_complexity(model: nn.Module, *args: Any, **kwargs: Any) -> Complexity:
    """Count parameters and operations of one forward pass, by the module's conventions.

    The pass runs on tensors without data: nothing is computed, and memory and time do not
    depend on the inputs' size. The model stays as it is. It is counted in the mode
    that it is in; call ``model.eval()`` before for its inference.
    ``scaled_dot_product_attention`` is counted as the two products and the softmax of
    its definition, whichever kernel would serve it.

    Args:
        model: Any model in whose forward pass no tensor's values decide what is executed.
        args: Positional inputs.
        kwargs: Inputs by name.

    Raises:
        ValueError: If an operator is met for which there is no rule, or whose result depends on
            a tensor's values; its name, and the module that executes it, are in the message.
    """
    counter = _Counter(type(model).__name__)
    # With gradients: without, a deployed FFN may go in bands whose overlap a CPU computes twice.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _tracked(model, counter.modules):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            # The weights too: an in-place change of a real tensor would be carried out.
            weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            weights, args, kwargs = tree_map_only(Tensor, fake.from_tensor, (weights, args, kwargs))
            with counter:
                functional_call(model, weights, args, kwargs)
    parameters: Dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition('.')[0]
        parameters[module] = parameters.get(module, 0) + parameter.numel()
    return Complexity(parameters, counter.operations)


def count_forms(model: nn.Module, shape: Tuple[int, int]) -> Dict[str, Complexity]:
    """Complexity of a toolbox's model for one image, in its training form and deployed.

    Both are counted as they are executed in evaluation. How many regions the second stage of a
    two-stage detector sees depends on the picture: it is counted for the most that its ``test_cfg``
    lets through, ``rpn.max_per_img`` proposals for boxes and ``rcnn.max_per_img`` detections for masks.
    Cutting these regions out of the feature maps (RoIAlign) is not counted.

    Args:
        model: A classifier, detector or segmentor in evaluation mode.
        shape: Height and width in pixels of the image that enters the backbone.

    Returns:
        ``training`` and ``deployed``; equal for a model without a deployed form.

    Raises:
        ValueError: See :func:`count_complexity`.
    """
    image = torch.empty(1, 3, *shape)
    if hasattr(model, 'roi_head'):
        model = copy.copy(model)
        model.forward = MethodType(_forward_with_most_regions, model)
    training = deployed = count_complexity(model, image, mode='tensor')
    if any(hasattr(module, 'switch_to_deploy') for module in model.modules()):
        twin = copy.deepcopy(model)
        switch_to_deploy(twin)
        deployed = count_complexity(twin, image, mode='tensor')
    return dict(training=training, deployed=deployed)


def _forward_with_most_regions(self: nn.Module, images: Tensor, **_: Any) -> Tuple[Any, ...]:
    """Pass of a two-stage detector of mmdet with empty regions in the place of the ones it finds."""
    features = self.extract_feat(images)
    roi_head = self.roi_head
    stages = [(roi_head.bbox_roi_extractor, roi_head.bbox_head, self.test_cfg.rpn.max_per_img)]
    if roi_head.with_mask:
        extractor = roi_head.mask_roi_extractor
        stages.append((extractor, roi_head.mask_head, self.test_cfg.rcnn.max_per_img))
    outputs = [self.rpn_head(features)]
    for extractors, heads, number in stages:
        several = isinstance(heads, nn.ModuleList)  # Cascade R-CNN
        for extractor, head in zip(extractors, heads) if several else [(extractors, heads)]:
            size = extractor.roi_layers[0].output_size
            outputs.append(head(images.new_zeros(number, extractor.out_channels, *size)))
    return tuple(outputs)


def image_shape(cfg: Config) -> Tuple[int, int]:
    """Height and width in pixels at which an experiment's complexity is stated.

    The crop of a segmentor's training, since the literature states that; of a classifier or
    detector what its test pipeline makes of an image that has the shape of its ``Resize``.

    Args:
        cfg: The experiment's config.

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
        raise ValueError('the config sets no fixed size for test images')
    return (size, size) if isinstance(size, int) else tuple(size)


def padded_shape(model: nn.Module, shape: Tuple[int, int]) -> Tuple[int, int]:
    """Height and width in pixels to which the model's data preprocessor pads an image of ``shape``."""
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    height, width = (math.ceil(length / divisor) * divisor for length in shape)
    return height, width


def complexity_rows(forms: Dict[str, Complexity]) -> List[dict]:
    """Lines of a report on :func:`count_forms`.

    Returns:
        One dict for each form, part and operator, with ``macs_g`` and
        ``elementwise_g`` in 10^9; besides for each part the operator 'all', which
        has also ``params_m`` in 10^6, and the part 'total'. The part 'other' is what the
        model does outside its parts.
    """
    rows = []
    for form, complexity in forms.items():
        for part, selected in {**complexity.parts(), 'total': complexity}.items():
            labels = dict(form=form, part=part or 'other')
            rows.append(
                dict(
                    **labels,
                    operator='all',
                    params_m=selected.params / 1e6,
                    macs_g=selected.macs / 1e9,
                    elementwise_g=selected.elementwise / 1e9,
                )
            )
            for operator, count in selected.by_operator().items():
                rows.append(
                    dict(
                        **labels,
                        operator=operator,
                        macs_g=count.macs / 1e9,
                        elementwise_g=count.elementwise / 1e9,
                    )
                )
    return rows


def plot_complexity(rows: List[dict], title: str, out: Path) -> None:
    """Draw :func:`complexity_rows` as bars: a line for each part and form, a colour for each operator.

    Args:
        rows: The lines.
        title: Title of the figure.
        out: PNG file to write; its folder must exist.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    detail = [row for row in rows if row['operator'] != 'all' and row['part'] != 'total']
    parts = dict.fromkeys(row['part'] for row in rows if row['part'] != 'total')
    forms = dict.fromkeys(row['form'] for row in rows)
    bars = [(part, form) for part in parts for form in forms]
    figure = Figure(figsize=(12, 2.4 + 0.45 * len(bars)), layout='constrained')
    for axes, key, label, colors in zip(
        figure.subplots(1, 2, sharey=True),
        ('macs_g', 'elementwise_g'),
        ('multiply-adds of products and convolutions ($10^9$)', 'other operations ($10^9$)'),
        (colormaps['tab10'], colormaps['Dark2']),
    ):
        widths = _bar_widths(detail, key, bars)
        left = [0.0] * len(bars)
        for number, (operator, lengths) in enumerate(widths.items()):
            axes.barh(
                range(len(bars)), lengths, left=left, label=operator, color=colors(number % 8)
            )
            left = [start + length for start, length in zip(left, lengths)]
        for position, end in enumerate(left):
            axes.annotate(
                f'{end:.3g}', (end, position), (3, 0), textcoords='offset points', va='center'
            )
        axes.set_xlim(0, 1.15 * max(left) or None)
        axes.set_xlabel(label)
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=3, fontsize='small')
    axes.set_yticks(range(len(bars)), [f'{part}, {form}' for part, form in bars])
    axes.invert_yaxis()  # the axes share it
    figure.suptitle(title)
    figure.savefig(out, dpi=150)


def _bar_widths(rows: List[dict], key: str, bars: List[Tuple[str, str]]) -> Dict[str, List[float]]:
    """Length of each operator's section in each bar; operators below 1 % of all are one, 'others'."""
    widths: Dict[str, List[float]] = {}
    for row in rows:
        lengths = widths.setdefault(row['operator'].replace('_', ' '), [0.0] * len(bars))
        lengths[bars.index((row['part'], row['form']))] += row[key]
    total = sum(map(sum, widths.values()))
    large = {name: lengths for name, lengths in widths.items() if sum(lengths) > 0.01 * total}
    small = [lengths for name, lengths in widths.items() if name not in large]
    large = dict(sorted(large.items(), key=lambda item: sum(item[1]), reverse=True))
    if any(map(sum, small)):
        large['others'] = [sum(column) for column in zip(*small)]
    return large


class _Counter(TorchDispatchMode):
    """Counts every operator that reaches ATen, under the name of the module that executes it."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self.model_name = model_name
        self.modules = ['']  # names of the modules being executed, the innermost last
        self.operations: Dict[Tuple[str, str], Count] = {}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple = (), kwargs: Optional[dict] = None
    ) -> Any:
        kwargs = kwargs or {}
        module = self.modules[-1]
        where = f'the operator {func} in {module or self.model_name}'
        try:
            out = func(*args, **kwargs)
        except UNKNOWN_RESULT as error:
            raise ValueError(
                f'{where} cannot be counted, since its result depends on values that are not '
                'computed: count the parts of the model before and after it'
            ) from error
        name = func.overloadpacket.__name__.strip('_').removeprefix('native_')
        count = _count(func, name, args, kwargs, out)
        if count is None:
            raise ValueError(
                f'{where} cannot be counted, since there is no rule for it: add it to one of the '
                f'tables in {__name__}, to FREE if it does no arithmetic'
            )
        if count != (0, 0):
            if name == 'convolution' and args[8] > 1:
                name = 'grouped_convolution'
            key = (module, name)
            self.operations[key] = self.operations.get(key, Count()).plus(count)
        return out


def _count(func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> Optional[Count]:
    """Operations of one call; None for an operator that is in no table."""
    if func.namespace not in ('aten', 'prim'):
        return None
    if name in FREE:
        return Count()
    if name in PRODUCTS:
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return Count(macs=flops // 2)
    if name in MATRIX_VECTOR:
        return Count(macs=args[MATRIX_VECTOR[name]].numel())
    if name in ELEMENTWISE:
        return Count(elementwise=out.numel())
    if name in REDUCTIONS:
        return Count(elementwise=args[0].numel())
    if name in SOFTMAX:
        return Count(elementwise=5 * out.numel())
    if name in POOLING:
        pooled = out if isinstance(out, Tensor) else out[0]
        window = args[1] if len(args[1]) == 2 else args[1] * 2
        return Count(elementwise=math.prod(window) * pooled.numel())
    if name in INTERPOLATION:
        return Count(elementwise=INTERPOLATION[name] * out.numel())
    if name in NORMS:
        affine = args[NORMS[name]] is not None
        fixed_statistics = name.startswith('batch_norm') and not args[5]
        return Count(elementwise=(affine + (1 if fixed_statistics else 4)) * args[0].numel())
    return None


@contextmanager
def _tracked(model: nn.Module, names: List[str]) -> Iterator[None]:
    """Keep in ``names`` the names of the modules that are being executed.

    Wraps ``forward`` instead of adding hooks, which do not see that the toolboxes
    call their heads as ``head.forward(x)``.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            forward = _named(module.forward, name, names)
            stack.enter_context(mock.patch.object(module, 'forward', forward))
        yield


def _named(forward: Callable[..., Any], name: str, names: List[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        names.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            names.pop()

    return call
