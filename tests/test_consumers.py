# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Whatever reads LinGlo's maps reads the right values: mmcv's operators, whole heads.

mmcv's compiled operators take a map for contiguous (B, C, H, W), whatever its strides are. A map of another
layout gives wrong values without an error. So every operator runs on the maps as LinGlo returns them, and on
fresh contiguous copies of them; both must give the same values and gradients.
"""

import ast
import importlib.util
import inspect
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from conftest import TINY_ARCH, randomize_norms_
from mmengine.registry import MODELS
from torch import Tensor

from mmlinglo import LinGlo

ops = pytest.importorskip('mmcv.ops', exc_type=ImportError)
compiled = pytest.importorskip('mmcv._ext', exc_type=ImportError)
if not compiled.__file__.endswith(tuple(EXTENSION_SUFFIXES)):
    pytest.skip("mmcv's operators are not compiled", allow_module_level=True)

SIZES = [(64, 96), (47, 33), (32, 32)]  # the last one gives maps of 1 x 1
FORMS = ('training', 'evaluation', 'deployed')


def seeded(function, *args):
    torch.manual_seed(1)
    return function(*args)


def boxes_in(x: Tensor) -> Tensor:
    """A region of each image, (B, 5): image, left, top, right, bottom."""
    height, width = x.shape[-2:]
    return torch.tensor([[i, 0.2, 0.1, 0.8 * width, 0.9 * height] for i in range(len(x))])


def rotated_boxes_in(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    return torch.tensor(
        [[i, width / 2, height / 2, 0.8 * width, 0.6 * height, 0.3] for i in range(len(x))]
    )


def rows_of(x: Tensor, columns: int) -> Tensor:
    """Some channels of the first image as one row for each position, as heads reshape their scores."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])[:, :columns]


def boxes_from(x: Tensor) -> Tensor:
    corner, size = rows_of(x, 4).split(2, dim=1)
    return torch.cat([corner, corner + size.abs() + 0.1], dim=1)


def layer(build):
    """An operator that is a layer with weights of its own, built for the channels of the map."""

    def run(x):
        module = seeded(build, x.shape[1])
        for i, parameter in enumerate(module.parameters()):  # some start from zero
            generator = torch.Generator().manual_seed(i)
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        return module.eval()(x)

    return run


def deformable(x, function, *tensors):
    batch, channels, height, width = x.shape
    generator = torch.Generator().manual_seed(2)
    shapes = dict(
        offset=(batch, 18, height, width),
        mask=(batch, 9, height, width),
        weight=(3, channels, 3, 3),
    )
    made = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    return function(x, *(made[name] for name in tensors))


def masked_conv(x):
    return seeded(ops.MaskedConv2d, x.shape[1], 3, 3, 1, 1)(x[:1], torch.ones(1, *x.shape[2:]))


def multi_scale_attention(x):
    module = seeded(
        lambda: ops.MultiScaleDeformableAttention(x.shape[1], 4, 1, 2, batch_first=True)
    )
    tokens = x.flatten(2).transpose(1, 2)
    points = torch.linspace(0, 1, tokens.shape[1] * 2).view(1, -1, 1, 2).expand(len(x), -1, 1, 2)
    return module(
        query=tokens,
        value=tokens,
        reference_points=points.contiguous(),
        spatial_shapes=torch.tensor([x.shape[2:]]),
        level_start_index=torch.tensor([0]),
    )


def batched_nms(x, kind):
    x = x.detach()
    scores = rows_of(x, 5)[:, 4].sigmoid()
    kept, _ = ops.batched_nms(
        boxes_from(x), scores, torch.zeros_like(scores), dict(type=kind, iou_threshold=0.4)
    )
    return kept


def nms_match(x):
    groups = ops.nms_match(torch.cat([boxes_from(x), rows_of(x, 5)[:, 4:].sigmoid()], dim=1), 0.4)
    return torch.cat([torch.as_tensor(group) for group in groups])


def merged(name, x):
    cells = importlib.import_module('mmcv.ops.merge_cells')
    cell = seeded(getattr(cells, name), x.shape[1], x.shape[1])
    return cell.eval()(x, 0.5 * x, out_size=x.shape[-2:])


OPERATORS = {
    'CARAFE': lambda x: ops.CARAFE(5, 1, 2)(
        x, torch.ones(len(x), 25, *(2 * n for n in x.shape[2:]))
    ),
    'CARAFEPack': layer(lambda channels: ops.CARAFEPack(channels, 2)),
    'ConcatCell': lambda x: merged('ConcatCell', x),
    'CornerPool': lambda x: torch.cat(
        [ops.CornerPool(mode)(x) for mode in ('top', 'bottom', 'left', 'right')]
    ),
    'CrissCrossAttention': layer(ops.CrissCrossAttention),
    'DeformConv2d': lambda x: deformable(
        x, lambda x, offset: seeded(ops.DeformConv2d, x.shape[1], 3, 3, 1, 1)(x, offset), 'offset'
    ),
    'DeformConv2dPack': layer(lambda channels: ops.DeformConv2dPack(channels, 3, 3, padding=1)),
    'DeformRoIPool': lambda x: ops.DeformRoIPool(3)(x, boxes_in(x)),
    'DeformRoIPoolPack': lambda x: seeded(ops.DeformRoIPoolPack, 3, x.shape[1])(x, boxes_in(x)),
    'GlobalPoolingCell': lambda x: merged('GlobalPoolingCell', x),
    'MaskedConv2d': masked_conv,
    'ModulatedDeformConv2d': lambda x: deformable(
        x,
        lambda x, offset, mask: seeded(ops.ModulatedDeformConv2d, x.shape[1], 3, 3, 1, 1)(
            x, offset, mask
        ),
        'offset',
        'mask',
    ),
    'ModulatedDeformConv2dPack': layer(
        lambda channels: ops.ModulatedDeformConv2dPack(channels, 3, 3, padding=1)
    ),
    'ModulatedDeformRoIPoolPack': lambda x: seeded(ops.ModulatedDeformRoIPoolPack, 3, x.shape[1])(
        x, boxes_in(x)
    ),
    'MultiScaleDeformableAttention': multi_scale_attention,
    'PSAMask': lambda x: ops.PSAMask('collect', (1, x.shape[1]))(x),
    'PrRoIPool': lambda x: ops.PrRoIPool(3, 1.0)(x, boxes_in(x)),
    'RiRoIAlignRotated': lambda x: ops.RiRoIAlignRotated(3, 1.0, 2, 2)(x, rotated_boxes_in(x)),
    'RoIAlign': lambda x: ops.RoIAlign(3)(x, boxes_in(x)),
    'RoIAlign, of the largest': lambda x: ops.RoIAlign(3, pool_mode='max')(x, boxes_in(x)),
    "RoIAlign, torchvision's": lambda x: ops.RoIAlign(3, use_torchvision=True)(x, boxes_in(x)),
    'RoIAlignRotated': lambda x: ops.RoIAlignRotated(3, 1.0, 2)(x, rotated_boxes_in(x)),
    'RoIPool': lambda x: ops.RoIPool(3)(x, boxes_in(x)),
    'SAConv2d': layer(lambda channels: ops.SAConv2d(channels, 4, 3, padding=1)),
    'SimpleRoIAlign': lambda x: ops.SimpleRoIAlign(3, 1.0)(x, boxes_in(x)),
    'SumCell': lambda x: merged('SumCell', x),
    'batched_nms': lambda x: batched_nms(x, 'nms'),
    'border_align': lambda x: ops.border_align(x[:, :8], boxes_from(x).view(len(x), -1, 4), 2),
    'deform_conv2d': lambda x: deformable(
        x, lambda *given: ops.deform_conv2d(*given, 1, 1), 'offset', 'weight'
    ),
    'modulated_deform_conv2d': lambda x: deformable(
        x,
        lambda *given: ops.modulated_deform_conv2d(*given, None, 1, 1),
        'offset',
        'mask',
        'weight',
    ),
    'nms': lambda x: ops.nms(boxes_from(x), rows_of(x, 5)[:, 4].sigmoid(), 0.4)[0],
    'nms_match': nms_match,
    'nms_rotated': lambda x: ops.nms_rotated(
        torch.cat([rows_of(x, 2), rows_of(x, 5)[:, 2:].abs() + 0.1], 1), rows_of(x, 1)[:, 0], 0.4
    )[0],
    'point_sample': lambda x: ops.point_sample(x, torch.rand(len(x), 9, 2, generator=seed())),
    'roi_align': lambda x: ops.roi_align(x, boxes_in(x), 3),
    'sigmoid_focal_loss': lambda x: ops.sigmoid_focal_loss(
        rows_of(x, 8), torch.zeros(len(rows_of(x, 1)), dtype=torch.long)
    ),
    'soft_nms': lambda x: batched_nms(x, 'soft_nms'),
    'softmax_focal_loss': lambda x: ops.softmax_focal_loss(
        rows_of(x, 8), torch.zeros(len(rows_of(x, 1)), dtype=torch.long)
    ),
}
SMALLEST = {'DeformConv2dPack': 3, 'SAConv2d': 3, 'deform_conv2d': 3}  # they refuse smaller maps
LEFT_OUT = {  # named by the toolboxes
    'line_nms': 'takes lanes',
    'rel_roi_point_to_rel_img_point': 'takes points',
    'SyncBatchNorm': 'needs several GPUs',
}


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def named_by_the_toolboxes() -> set:
    """Operators that mmdet's and mmseg's sources import, and those that their configs may name.

    Configs name operators by `type`: layers that mmcv registers, such as DCN, and whatever pools regions.
    """
    names = set()
    for package in ('mmdet', 'mmseg'):
        spec = importlib.util.find_spec(package)
        for path in Path(spec.origin).parent.rglob('*.py') if spec else ():
            if '.mim' in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and re.match(r'mmcv\.ops\b', node.module or ''):
                    names.update(alias.name for alias in node.names)
    registered = set(MODELS.module_dict.values())
    for name, value in vars(ops).items():
        pools = re.fullmatch(r'\w*RoI(Align|Pool)\w*', name) and hasattr(value, 'forward')
        layer = inspect.isclass(value) and value in registered
        if pools or (layer and 'sparse' not in value.__module__):  # sparse ones take point clouds
            names.add(name)
    return names


def test_all_operators_of_the_toolboxes_are_here():
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    named = named_by_the_toolboxes()
    assert {'RoIAlign', 'RoIPool', 'DeformConv2dPack', 'point_sample', 'PSAMask'} <= named
    assert named - {*OPERATORS, *LEFT_OUT} == set()


def maps_of(form: str, size, **settings):
    torch.manual_seed(0)
    model = randomize_norms_(LinGlo(TINY_ARCH, **settings))
    model.train(form == 'training')
    if form == 'deployed':
        model.switch_to_deploy()
    return model(torch.randn(2, 3, *size))


def contiguous_copy(x: Tensor) -> Tensor:
    copy = torch.empty(x.shape).copy_(x.detach())
    assert copy.stride() == torch.empty(x.shape).stride()
    return copy


class NoKernelError(Exception):
    """The operator has no implementation for this device."""


def run(operator, x: Tensor):
    """Values and gradients of an operator, or what a kernel without regard for strides would read."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    try:
        result = OPERATORS[operator](x)
    except RuntimeError as error:
        if 'implementation for device cpu not found' not in str(error):
            raise
        return None
    if not (isinstance(result, Tensor) and result.requires_grad):
        return [torch.as_tensor(result)]
    weights = torch.linspace(-1, 1, result.numel()).view(result.shape)
    return [result, *torch.autograd.grad((result * weights).sum(), x)]


def read_without_strides(operator, x: Tensor, monkeypatch):
    """What the operator gives to its missing kernel, as a kernel that ignores strides reads it."""
    given = []

    def record(*args, **kwargs):
        given.extend(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        raise NoKernelError

    with monkeypatch.context() as patch:
        for name in dir(compiled):
            if callable(getattr(compiled, name)) and not name.startswith('_'):
                patch.setattr(compiled, name, record)
        with pytest.raises(NoKernelError):
            OPERATORS[operator](x)
    return [value.as_strided((value.numel(),), (1,)) for value in given]


def assert_reads_rightly(operator, x: Tensor, monkeypatch):
    copy = contiguous_copy(x)
    ours, expected = run(operator, x), run(operator, copy)
    if expected is None:
        ours, expected = (read_without_strides(operator, y, monkeypatch) for y in (x, copy))
    assert len(ours) == len(expected) >= 1
    for value, reference in zip(ours, expected):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('operator', OPERATORS)
def test_operators_read_the_maps_rightly(operator, form, monkeypatch):
    for size in SIZES:
        for x in maps_of(form, size):
            if min(x.shape[2:]) >= SMALLEST.get(operator, 1):
                assert_reads_rightly(operator, x, monkeypatch)


# Those that read maps of another layout wrongly, or refuse them, in every release of mmcv 2.
WRONG = [
    'DeformConv2d',
    'DeformRoIPool',
    'ModulatedDeformConv2d',
    'RoIAlign',
    'RoIAlignRotated',
    'RoIPool',
]


@pytest.mark.parametrize('operator', WRONG)
def test_operators_read_channels_last_maps_wrongly(operator, monkeypatch):
    """As LinGlo returned them once: the test above can fail."""
    x = maps_of('evaluation', SIZES[0], channels_last=True)[1]
    assert x.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises((AssertionError, RuntimeError), match=r'not close|must be contiguous'):
        assert_reads_rightly(operator, x, monkeypatch)
