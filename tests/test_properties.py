# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What holds for all sizes, architectures and options, on examples that hypothesis chooses.

A few examples of each by default, and many with `-m soak`.
"""

import copy
import math
from typing import Callable

import numpy as np
import pytest
import torch
from conftest import randomize_norms_
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mmlinglo import LinGlo
from mmlinglo.models import ConditionalPositionalEncoding, KeyOnlyAttention
from mmlinglo.models.network import ENCODINGS


def property_test(few: int, many: int, **strategies: st.SearchStrategy) -> Callable:
    """Make a test of a function of examples."""

    def decorate(check: Callable) -> Callable:
        @pytest.mark.parametrize('examples', [few, pytest.param(many, marks=pytest.mark.soak)])
        def test(examples):
            profile = settings(
                max_examples=examples,
                deadline=None,
                derandomize=True,  # the same examples in every run
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            profile(given(**strategies)(check))()

        test.__doc__ = check.__doc__
        return test

    return decorate


@st.composite
def architectures(draw) -> dict:
    num_stages = draw(st.integers(1, 5))
    heads, dims, strides = [], [], []
    for stage in range(num_stages):
        strides.append(draw(st.sampled_from([4, 2, 3, 1] if stage == 0 else [2, 1, 3, 4])))
        if stage and strides[-1] == 1:  # such a stage keeps the channels
            dims.append(dims[-1])
            heads.append(draw(st.sampled_from([h for h in (1, 2, 3, 4) if dims[-1] % h == 0])))
        else:
            heads.append(draw(st.integers(1, 4)))
            dims.append(heads[-1] * draw(st.integers(1, 4)))
    arch = dict(
        embed_dims=dims,
        depths=draw(st.lists(st.integers(0, 2), min_size=num_stages, max_size=num_stages)),
        num_heads=heads,
        mlp_ratio=draw(
            st.lists(st.sampled_from([1, 2, 1.5]), min_size=num_stages, max_size=num_stages)
        ),
    )
    if draw(st.booleans()):
        arch['strides'] = strides
    elif any(stride == 1 for stride in strides[1:]):
        arch['embed_dims'] = [heads[i] * 2 for i in range(num_stages)]
    return arch


@st.composite
def backbones(draw, **fixed) -> LinGlo:
    arch = draw(architectures())
    num_stages = len(arch['depths'])
    stages = draw(st.lists(st.integers(0, num_stages - 1), min_size=1, unique=True))
    indices = [i - num_stages if draw(st.booleans()) else i for i in stages]
    pos_encoding = draw(st.sampled_from([*ENCODINGS, 'absolute', None]))
    letters = 'CH' if pos_encoding in ENCODINGS else 'H'
    options = dict(
        arch=arch,
        in_channels=draw(st.sampled_from([3, 1, 4])),
        drop_path_rate=draw(st.sampled_from([0.0, 0.5])),
        attention=draw(st.sampled_from(list(LinGlo.attentions))),
        pos_encoding=pos_encoding,
        layout='-'.join(draw(st.sampled_from(letters)) for _ in range(num_stages)),
        overlap=draw(st.booleans()),
        img_size=64,
        out_indices=indices[0] if len(indices) == 1 and draw(st.booleans()) else indices,
        frozen_stages=draw(st.integers(-1, num_stages)),
        qkv_bias=draw(st.booleans()),
        norm_eval=draw(st.booleans()),
        with_cp=draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    model = LinGlo(**{**options, **fixed})
    model.init_weights()
    return randomize_norms_(model)


@st.composite
def image_sizes(draw, longest=2000) -> tuple:
    """Small ones and, every third, narrow ones."""
    if draw(st.integers(0, 2)) == 2:
        return draw(st.permutations([draw(st.integers(32, 48)), draw(st.integers(49, longest))]))
    return draw(st.integers(32, 80)), draw(st.integers(32, 80))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same images in another order in memory."""
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'part':  # of larger images, as a crop
        padded = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), torch.nan)
        padded[:, :, 2:-1, 1:-4] = x
        return padded[:, :, 2:-1, 1:-4]
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == 'transposed' else x


LAYOUTS = st.sampled_from(['contiguous', 'channels_last', 'part', 'transposed'])


def map_sizes(model: LinGlo, images: Tensor) -> list:
    """Documented ones of all stages, of the sizes of the images and the strides."""
    sizes, stride = [], 1
    for step in model.arch['strides']:
        stride *= step
        sizes.append(tuple(math.ceil(pixels / stride) for pixels in images.shape[2:]))
    return sizes


@property_test(
    8, 600, model=backbones(), size=image_sizes(), batch=st.integers(0, 3), layout=LAYOUTS
)
def test_maps_in_evaluation(model, size, batch, layout):
    """Of the documented sizes, and the same with gradients, when deployed and in any layout."""
    size = [max(pixels, model.min_size) for pixels in size]
    model.eval()
    images = torch.randn(batch, model.in_channels, *size)
    with torch.no_grad():
        outs = model(laid_out(images, layout))
        expected = model(images)
    sizes = map_sizes(model, images)
    assert [tuple(out.shape) for out in outs] == [
        (batch, model.arch['embed_dims'][i], *sizes[i]) for i in model.out_indices
    ]
    assert all(out.isfinite().all() for out in outs)
    assert_close(outs, expected, rtol=1e-3, atol=1e-3)
    assert_close(model(images), expected, rtol=1e-3, atol=1e-3)
    model.double()
    with torch.no_grad():
        expected = model(images.double())
        model.switch_to_deploy()
        deployed = model(images.double())
    for out, reference in zip(deployed, expected):
        scale = 1 + reference.square().mean().sqrt() if batch else 1
        assert_close(out / scale, reference / scale, rtol=0, atol=1e-9)


@property_test(
    12, 400, model=backbones(), size=image_sizes(), batch=st.integers(1, 3), layout=LAYOUTS
)
def test_training(model, size, batch, layout):
    """Finite maps and gradients; nothing else is trained than what is not frozen."""
    size = [max(pixels, model.min_size) for pixels in size]
    model.train()
    images = laid_out(torch.randn(batch, model.in_channels, *size), layout)
    sizes = map_sizes(model, images)
    single = [
        i
        for i in range(max(model.frozen_stages, 0), len(model.stages))
        if batch == 1 and sizes[i] == (1, 1) and model.arch['depths'][i]
    ]
    if single and model.pos_encoding in ENCODINGS and not model.norm_eval:
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            model(images)
        return
    outs = model(images)
    assert all(out.isfinite().all() for out in outs)
    loss = sum((out * torch.randn_like(out)).sum() for out in outs)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = ['patch_embed.'] if model.frozen_stages >= 0 else []
    for i in range(model.frozen_stages):
        frozen += [f'stages.{i}.', f'norm{i}.']
    assert trained == {
        name for name, _ in model.named_parameters() if not name.startswith(tuple(frozen))
    }
    if trained:
        loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1, 1e4])
def test_mixed_precision_on_large_images(dtype, scale):
    """With pixels, keys and hidden maps whose sums and squares are beyond float16."""
    arch = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratio=(2, 2))
    model = LinGlo(arch, out_indices=(0, 1))
    model.init_weights()
    randomize_norms_(model).train()
    for stage in model.stages:
        stage.blocks[0].ffn.fc1.bias.data += 1000
        stage.blocks[0].attn.key.bias.data += 300
    images = scale * torch.randn(1, 3, 800, 1333)
    with torch.no_grad():
        expected = copy.deepcopy(model)(images)
    with torch.autocast('cpu', dtype=dtype):
        outs = model(images)
        loss = sum(out.float().square().mean() for out in outs)
    loss.backward()
    for out, reference in zip(outs, expected):
        error = (out.float() - reference).abs().max() / reference.abs().max()
        assert error < 4 * torch.finfo(dtype).eps
    tensors = [*(p.grad for p in model.parameters()), *model.buffers()]
    assert all(tensor.isfinite().all() for tensor in tensors)


ARCH = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratio=(2, 2), strides=(4, 2))
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=3),
    st.lists(st.one_of(st.integers(-4, 4), st.floats(), st.text(max_size=1)), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


def is_integer(low, high=99):
    return lambda value: type(value) is int and low <= value <= high


def is_flag(value):
    return isinstance(value, bool)


def is_stage_numbers(value):
    numbers = [value] if type(value) is int else value
    return (
        isinstance(numbers, list)
        and len(numbers) > 0
        and all(type(i) is int and -2 <= i < 2 for i in numbers)
        and len({i % 2 for i in numbers}) == len(numbers)
    )


ALLOWED = dict(
    arch=lambda _: False,
    in_channels=is_integer(1),
    drop_path_rate=lambda value: type(value) in (int, float) and 0 <= value < 1,
    attention=lambda _: False,
    pos_encoding=lambda value: value is None,
    layout=lambda value: value is None,
    overlap=is_flag,
    img_size=is_integer(1),
    out_indices=is_stage_numbers,
    frozen_stages=is_integer(-1, 2),
    qkv_bias=is_flag,
    norm_cfg=lambda value: value is None,
    norm_eval=is_flag,
    mask_padding=is_flag,
    with_cp=is_flag,
    deploy=is_flag,
    fast=lambda value: value is None or is_flag(value),
    init_cfg=lambda value: value is None or value == [],
    embed_dims=lambda value: type(value) is int and value > 0 and value % 2 == 0,
    depths=is_integer(0),
    num_heads=lambda value: type(value) is int and value in (1, 2, 4, 8),
    mlp_ratio=lambda value: type(value) in (int, float) and 1 / 16 <= value < 99,
    strides=is_integer(1),
)


@property_test(60, 600, name=st.sampled_from(list(ALLOWED)), value=ANYTHING)
def test_arguments(name, value):
    """What is not allowed is an error that names the argument, the value and what is allowed."""
    assume(name != 'strides' or type(value) is not int or value != 1)  # whether it fits: other test
    assume(name != 'mlp_ratio' or type(value) is not float or not 99 <= value < math.inf)  # large
    arguments = dict(arch=ARCH, out_indices=(0, 1))
    if name in ARCH:
        arguments['arch'] = {**ARCH, name: (ARCH[name][0], value)}
    else:
        arguments[name] = value
    if ALLOWED[name](value):
        LinGlo(**arguments)
        return
    with pytest.raises((ValueError, TypeError), match=name) as error:
        LinGlo(**arguments)
    assert ' must ' in str(error.value)
    assert repr(value) in str(error.value)


@property_test(
    30,
    200,
    layer=st.sampled_from(
        [
            (KeyOnlyAttention, dict(embed_dims=8, num_heads=2), 'embed_dims'),
            (KeyOnlyAttention, dict(embed_dims=8, num_heads=2), 'num_heads'),
            (ConditionalPositionalEncoding, dict(channels=4), 'channels'),
            (ConditionalPositionalEncoding, dict(channels=4), 'num_branches'),
        ]
    ),
    value=ANYTHING,
)
def test_arguments_of_layers(layer, value):
    kind, arguments, name = layer
    arguments = {**arguments, name: value}
    fits = type(value) is int and value > 0
    if fits and kind is KeyOnlyAttention:
        fits = arguments['embed_dims'] % arguments['num_heads'] == 0
    if fits:
        kind(**arguments)
        return
    with pytest.raises((ValueError, TypeError), match=name) as error:
        kind(**arguments)
    assert ' must ' in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (None, 'tensor of normalized, floating-point pixels, got NoneType'),
        (np.zeros((1, 3, 32, 32), np.float32), 'got ndarray'),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r'got torch\.uint8'),
        (torch.zeros(3, 32, 32), r'shape \(B, 3, H, W\), got \(3, 32, 32\)'),
        (torch.zeros(1, 4, 32, 32), r'shape \(B, 3, H, W\), got \(1, 4, 32, 32\)'),
        (
            torch.zeros(0, 3, 32, 32),
            r'training needs images, got a batch of shape \(0, 3, 32, 32\)',
        ),
    ],
)
def test_images_that_are_none(images, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LinGlo(arch=ARCH, out_indices=(0, 1)).train()(images)
