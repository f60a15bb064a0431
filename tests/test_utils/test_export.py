# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The deployed form through PyTorch's compilers and ONNX Runtime; the training form's eager outputs are expected."""

import copy
import json
import math
import warnings

import onnx
import pytest
import torch
from conftest import ROOT, needs_exporter, randomize_norms_
from mmengine.config import Config
from torch.export import Dim

from mmlinglo import LinGlo
from mmlinglo.utils.export import describe_preprocessing, export_onnx, relative_error, run_onnx
from mmlinglo.utils.files import complete_file

ARCH = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratio=(2, 2))
ONE_STAGE = dict(embed_dims=(64,), depths=(1,), num_heads=(2,), mlp_ratio=(1,))
# Positions and channels of the last stage: 96, 80 and 16 for 16, or 384, 304 and 64 for 64, so that
# both of the attention's orders occur; one image and several; odd sizes.
SHAPES = [(2, 3, 64, 96), (1, 3, 75, 64), (3, 3, 32, 32)]
FREE = {
    i: Dim.DYNAMIC if hasattr(Dim, 'DYNAMIC') else Dim(f'size{i}', min=32 if i else 1)  # torch 2.5
    for i in (0, 2, 3)
}
VARIANTS = {
    'RP-CPE': dict(),
    'P-CPE': dict(pos_encoding='P-CPE'),
    'R-CPE': dict(pos_encoding='R-CPE'),
    'CPE': dict(pos_encoding='CPE'),
    'no-encoding': dict(pos_encoding=None),
    'absolute': dict(pos_encoding='absolute', overlap=False, img_size=64),
    'dot-product': dict(attention='dot_product'),
    'C-H': dict(layout='C-H'),
    'no-qkv-bias': dict(qkv_bias=False),
    'no-norm': dict(norm_cfg=None),
}
ROUNDING = 1e-5  # of float32, relative to the largest output; measured: below 1e-6


def deployed_and_expected(arch=ARCH, shapes=SHAPES, **kwargs):
    """A deployed backbone, images, and what the training form makes of them."""
    model = LinGlo(arch=arch, out_indices=range(len(arch['depths'])), **kwargs)
    model.init_weights()
    randomize_norms_(model).eval()
    images = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        expected = [model(x) for x in images]
    model.switch_to_deploy()
    return model.requires_grad_(False), images, expected


def assert_agree(function, images, expected, tolerance=ROUNDING):
    for x, outputs in zip(images, expected):
        assert relative_error(function(x), outputs) < tolerance, tuple(x.shape)


@pytest.mark.parametrize(
    ('backend', 'dynamic'),
    [
        ('eager', False),
        ('eager', True),
        ('aot_eager', False),
        pytest.param('aot_eager', True, marks=pytest.mark.slow),
        pytest.param('inductor', False, marks=pytest.mark.slow),
        pytest.param('inductor', True, marks=pytest.mark.slow),
    ],
)
def test_compile_without_a_graph_break(backend, dynamic):
    model, images, expected = deployed_and_expected(ONE_STAGE)
    if not dynamic:  # one size of each of the attention's orders
        images, expected = images[::2], expected[::2]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    assert_agree(compiled, images, expected)


def test_one_compilation_for_all_sizes():
    """The order of the attention must not depend on a size that the graph leaves free."""
    from torch._dynamo.testing import CompileCounter

    shapes = [(2, 3, 64, 96), (3, 3, 32, 32), (2, 3, 33, 130)]
    model, images, expected = deployed_and_expected(ONE_STAGE, shapes)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    assert_agree(compiled, images, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    'strict',
    [
        False,
        pytest.param(
            True,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not hasattr(Dim, 'DYNAMIC'), reason='fails in torch 2.5 on any autocast'
                ),
            ],
        ),
    ],
    ids=['traced', 'strict'],
)
def test_torch_export(strict):
    model, images, expected = deployed_and_expected()
    fixed = torch.export.export(model, (images[0],), strict=strict).module()
    assert_agree(fixed, images[:1], expected[:1])
    dynamic = torch.export.export(
        model, (images[0],), dynamic_shapes=(FREE,), strict=strict
    ).module()
    assert_agree(dynamic, images, expected)


@pytest.mark.parametrize('kwargs', VARIANTS.values(), ids=VARIANTS)
def test_torchscript_of_every_variant(kwargs, tmp_path):
    model, images, expected = deployed_and_expected(**kwargs)
    with warnings.catch_warnings():
        # The check of the smallest size is not part of the graph; TorchScript is deprecated.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        torch.jit.trace(model, images[0]).save(tmp_path / 'model.pt')
        traced = torch.jit.load(tmp_path / 'model.pt')
    assert_agree(traced, images, expected)


@pytest.mark.parametrize('dynamic', [False, pytest.param(True, marks=needs_exporter)])
def test_onnx_runtime(dynamic, tmp_path):
    model, images, expected = deployed_and_expected()
    path = tmp_path / 'model.onnx'
    names = ['stage0', 'stage1']
    export_onnx(model, path, SHAPES[0], names, dynamic, metadata=dict(origin='test'))
    graph = onnx.load(path).graph
    sizes = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == (['batch', 3, 'height', 'width'] if dynamic else list(SHAPES[0]))
    assert [output.name for output in graph.output] == names
    assert {p.key: p.value for p in onnx.load(path).metadata_props}['origin'] == 'test'
    num = len(images) if dynamic else 1
    assert_agree(lambda x: run_onnx(path, x), images[:num], expected[:num])
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']


@pytest.mark.parametrize('opset', [17, 24])
def test_opsets_that_would_not_be_written(opset, tmp_path):
    with pytest.raises(ValueError, match=f'18-23 or None, got {opset}'):
        export_onnx(torch.nn.Identity(), tmp_path / 'x.onnx', SHAPES[0], ['y'], opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('dtype', 'tolerance'),
    [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)],  # measured: 0.011 and 0.002
    ids=str,
)
def test_half_precision_on_the_cpu(dtype, tolerance):
    model, images, expected = deployed_and_expected()
    with torch.autocast('cpu', dtype=dtype):
        assert_agree(model, images, expected, tolerance)
    half = copy.deepcopy(model).to(dtype)
    outputs = half(images[0].to(dtype))
    assert {out.dtype for out in outputs} == {dtype}
    assert relative_error(outputs, expected[0]) < tolerance


def test_relative_error():
    expected = [torch.tensor([1.0, -4.0]), torch.tensor([[10.0]])]
    outputs = [torch.tensor([1.5, -4.0]), torch.tensor([[10.0]])]
    assert relative_error(outputs, expected) == 0.5 / 4
    with pytest.raises(ValueError, match=r'\[\(2,\)\], expected \[\(2,\), \(1, 1\)\]'):
        relative_error(outputs[:1], expected)
    broken = torch.tensor([[torch.nan]])
    assert math.isnan(relative_error([outputs[0], broken], expected))
    assert math.isnan(relative_error([broken, outputs[0]], expected[::-1]))


@pytest.mark.parametrize(
    ('config', 'order'),
    [
        ('imagenet/linglo-b0_8xb128_in1k.py', 'RGB'),
        ('coco/retinanet_linglo-b0_fpn_1x_coco.py', 'RGB'),
        ('ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py', 'RGB'),
    ],
)
def test_preprocessing_of_the_recipes(config, order):
    found = describe_preprocessing(Config.fromfile(ROOT / 'configs' / config))
    assert found['channel_order'] == order
    assert json.loads(found['mean']) == [123.675, 116.28, 103.53]
    assert json.loads(found['std']) == [58.395, 57.12, 57.375]


def test_preprocessing_that_a_config_does_not_state():
    assert describe_preprocessing(Config(dict(model=dict(type='ImageClassifier')))) == dict(
        channel_order='BGR', mean='[0.0, 0.0, 0.0]', std='[1.0, 1.0, 1.0]'
    )


def test_complete_files_only(tmp_path):
    path = tmp_path / 'folder/file.onnx'
    with complete_file(path) as file:
        assert file.parent == path.parent
        assert file.suffix == '.onnx'
        file.write_text('first')
        assert not path.exists()
    assert path.read_text() == 'first'

    def fail():
        with complete_file(path) as file:
            file.write_text('half')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == 'first'
    assert list(path.parent.iterdir()) == [path]
