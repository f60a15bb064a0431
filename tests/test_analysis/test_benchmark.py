# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import pandas as pd
import pytest
import torch
from conftest import TINY_ARCH
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn
from torch.multiprocessing import ProcessExitedException
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmlinglo import LinGlo
from mmlinglo.analysis import bars, benchmark, figures, peers
from mmlinglo.analysis.bars import Bar, Layer, list_layers, measure_saved_mib
from mmlinglo.analysis.benchmark import (
    Setting,
    add_ratios,
    list_settings,
    make_step,
    measure_backbones,
    time_steps,
)
from mmlinglo.analysis.complexity import pad
from mmlinglo.analysis.figures import plot_accuracy, plot_sweep
from mmlinglo.analysis.memory import OutOfMemoryError, call_in_fresh_process
from mmlinglo.analysis.peers import PEERS, STAGES, build_backbone, fuse
from mmlinglo.models.fast import FFN, ConditionalPositionalEncoding


@pytest.fixture(autouse=True)
def _one_thread():
    """On a machine that has other work too, more of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def as_list(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


# --- backbones


@pytest.mark.parametrize('name', PEERS)
def test_every_backbone_builds(name):
    peer = PEERS[name]
    if not peer.has_maps:
        with torch.device('meta'):
            assert build_backbone(name, (224, 224))(torch.empty(1, 3, 224, 224)).dim() == 2
        with pytest.raises(ValueError, match='no four feature maps'):
            build_backbone(name, (64, 96), STAGES)
        return
    with torch.no_grad():
        model = build_backbone(name, (64, 96), STAGES)
        maps = model(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    last = build_backbone(name, (64, 96), STAGES[3:])(torch.zeros(1, 3, 64, 96))
    assert [m.shape for m in last] == [maps[3].shape]
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    assert has_batch_norm == peer.fused
    if peer.top1 is not None:
        assert 69 < peer.top1 < 83
        assert 'arXiv' in peer.source or 'torchvision' in peer.source or 'Table 2' in peer.source


def test_attention_of_the_fourth_figure():
    """Only the materialised kernel holds the N x N matrix, forward and backward."""

    class LargestTensor(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.elements = max(self.elements, *sizes, 0)
            return out

    # Stage 1 of a 128-pixel image: N = 32 * 32 positions, one head, batch 2.
    for name in ('linglo_b0', 'linglo_b0_dot_product', 'linglo_b0_dot_product_materialised'):
        model = build_backbone(name, (128, 128), fused=True)
        setting = Setting(name, batch_size=2, shape=(128, 128), train_step=True)
        steps = [setting.build_step(), lambda m=model: m(torch.zeros(2, 3, 128, 128))]
        for step in steps:
            with LargestTensor() as largest:
                step()
            has_matrix = largest.elements == 2 * 1024 * 1024
            assert has_matrix == name.endswith('_materialised'), name
            assert has_matrix or largest.elements < 1024 * 1024


@pytest.mark.parametrize(
    ('name', 'channels'),
    [
        ('linglo_b0', 256),
        ('pvt_v2_b0', 256),
        ('poolformer_s12', 512),
        ('swin_tiny_patch4_window7_224', 768),
        ('convnext_tiny', 768),
    ],
)
def test_features_are_pooled(name, channels):
    with torch.device('meta'):
        assert build_backbone(name, (64, 96))(torch.empty(2, 3, 64, 96)).shape == (2, channels)


@pytest.mark.parametrize(
    ('name', 'channels', 'heads', 'millions'),
    [
        # parameters with classifiers for 1000 classes, as timm's table of results has them
        ('pvt_v2_b0', 256, 1, 3.67),
        ('pvt_v2_b1', 512, 1, 14.01),
        ('poolformer_s12', 512, 1, 11.92),
        ('efficientformerv2_s0', 176, 2, 3.60),
        ('resnet18', 512, 1, 11.69),
        ('resnet50', 2048, 1, 25.56),
    ],
)
def test_peers_have_their_published_parameters(name, channels, heads, millions):
    with torch.device('meta'):
        model = build_backbone(name, (224, 224))
    counted = sum(p.numel() for p in model.parameters()) + heads * 1000 * (channels + 1)
    assert counted / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize('maps', [False, True])
@pytest.mark.parametrize(
    'name', ['swiftformer_xs', 'fastvit_t8', 'efficientformerv2_s0', 'repvit_m0_9', 'resnet18']
)
def test_fused_peers_agree(name, maps):
    model = build_backbone(name, (64, 64), STAGES if maps else ())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = as_list(model(images))
        fused = fuse(model)
        after = as_list(fused(images))
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert norms <= 5  # those that follow no convolution, in SwiftFormer


def test_build_backbone_refuses():
    with pytest.raises(ValueError, match="no backbone 'vgg'; there are linglo_b0"):
        build_backbone('vgg', (64, 64))
    with pytest.raises(ValueError, match="'pvt_v2_b0' has nothing to fuse"):
        build_backbone('pvt_v2_b0', (64, 64), fused=True)
    with pytest.raises(ValueError, match="'linglo_b0': the fused form is not for training"):
        Setting('linglo_b0', fused=True, train_step=True)


# --- the comparison


def test_settings():
    assert pad((800, 1333)) == (800, 1344)
    assert pad((224, 224)) == (224, 224)
    with pytest.raises(ValueError, match='at least 32 pixels'):
        Setting('resnet18', shape=(224, 16))
    with pytest.raises(ValueError, match=r'at least 64 pixels.*got \(32, 64\)'):
        Setting('resnet18', shape=(32, 64), train_step=True)
    with pytest.raises(ValueError, match='must be at least 1, got 0'):
        Setting('resnet18', batch_size=0)
    with pytest.raises(ValueError, match='no four feature maps'):
        Setting('coatnet_0_224', maps=True)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match="device 'cuda': PyTorch finds no GPU here"):
        Setting('resnet18', device='cuda')


def test_list_of_settings():
    both = list_settings(['linglo_b0', 'pvt_v2_b0'])
    assert both == [Setting('linglo_b0'), Setting('linglo_b0', True), Setting('pvt_v2_b0')]
    compiled = list_settings(['resnet18'], ['fused'], compiled=True, batch_size=3)
    assert compiled == [Setting('resnet18', True, engine, 3) for engine in (False, True)]
    with pytest.raises(ValueError, match="no backbone 'vgg'; there are linglo_b0"):
        list_settings(['vgg'])


def test_timing_is_interleaved():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in 'ab'}
    times = time_steps(steps, rounds=3, warmup=2, min_seconds=1e-12)
    assert ''.join(calls) == 'aabb' + 3 * 'ab'
    for lower, median, upper in times.values():
        assert 0 < lower <= median <= upper


def test_steps():
    model = LinGlo(TINY_ARCH)
    images = torch.randn(2, 3, 64, 64)
    outputs = make_step(model.eval(), images, train_step=False)()
    assert [tuple(out.shape[2:]) for out in outputs] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert all(out.is_inference() for out in outputs)
    half = make_step(nn.Conv2d(3, 4, 1), images, train_step=False, autocast=True)()
    assert half.dtype == torch.bfloat16
    assert all(parameter.grad is None for parameter in model.parameters())
    train = make_step(model.train(), images, train_step=True)
    train()
    first = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    train()  # not added to the first step's
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name])


@pytest.mark.parametrize('dtype', ['bfloat16', 'autocast'])
def test_whole_setting_reaches_the_step(monkeypatch, dtype):
    seen = {}
    monkeypatch.setattr(
        benchmark, 'make_step', lambda model, x, **how: seen.update(how, model=model, images=x)
    )
    Setting('resnet18', batch_size=2, shape=(64, 96), train_step=True, dtype=dtype).build_step()
    assert seen['images'].shape == (2, 3, 64, 96)
    assert seen['model'].training
    assert seen['train_step']
    assert seen['autocast'] == (dtype == 'autocast')
    for tensor in (seen['images'], seen['model'].conv1.weight):
        assert tensor.dtype == (torch.float32 if dtype == 'autocast' else torch.bfloat16)


def test_profile_in_a_process_of_its_own():
    peak, seconds = call_in_fresh_process(
        benchmark.profile,
        Setting('resnet18', shape=(64, 64), maps=True),
        Setting('resnet18', shape=(640, 640), maps=True),
    )
    # The maps after the first convolution alone: 64 channels of half the size, beside 43 MiB of
    # weights; in all less than 200 MiB, while a process that has imported torch has more.
    assert 64 * 320 * 320 * 4 / 2**20 + 43 < peak < 200
    assert seconds > 0


def fake_processes(monkeypatch, profiles):
    """Results of the processes: given profiles, and 10 ms more for each backbone timed."""

    def call(function, *args):
        outcome = profiles(args[1] if function is benchmark.profile else None)
        if isinstance(outcome, Exception):
            raise outcome
        if function is benchmark.profile:
            return outcome
        return {setting: [9.0 * i, 10.0 * i, 12.0 * i] for i, setting in enumerate(args[0], 1)}

    monkeypatch.setattr(benchmark, 'call_in_fresh_process', call)


def test_rows_and_what_did_not_fit(monkeypatch):
    outcomes = {
        'linglo_b0': (50.0, 0.5),
        'pvt_v2_b0': OutOfMemoryError('x'),
        'swin_tiny_patch4_window7_224': (70.0, 3.0),
        'poolformer_s12': ProcessExitedException('x', 0, 1, -11, 'SIGSEGV'),
        'resnet18': (80.0, 1.0),
    }
    fake_processes(monkeypatch, lambda setting: outcomes[setting.model] if setting else None)
    settings = list_settings(list(outcomes), ['trained'], compiled=True, batch_size=4)
    rows = list(measure_backbones(settings, [(224, 224)], 2, max_seconds=2.0))
    found = {(row['model'], row['engine']): row for row in rows}
    status = {key: row['status'] for key, row in found.items()}
    for engine in ('eager', 'compiled'):
        assert status['linglo_b0', engine] == status['resnet18', engine] == 'ok'
        assert status['pvt_v2_b0', engine] == 'out of memory'
        assert status['swin_tiny_patch4_window7_224', engine] == 'too slow'
        assert status['poolformer_s12', engine] == 'crashed'
    third = found['resnet18', 'eager']  # of those that were timed
    quartiles = [third[f'latency{name}_ms'] for name in ('_lower', '', '_upper')]
    assert quartiles == [27, 30, 36]
    assert third['images_per_s'] == pytest.approx(4 / 0.03)
    assert (third['peak_memory_mib'], third['first_call_s']) == (80.0, 1.0)
    assert third['top1'] == 69.758
    # ResNet18 has 1.814 G multiply-adds, 1.8136 G without the classifier (0.5 M): those of one image.
    assert third['macs_g'] == pytest.approx(1.8136, rel=1e-4)
    assert third['params_m'] == pytest.approx(11.689512 - 0.513)
    slow = found['swin_tiny_patch4_window7_224', 'eager']
    assert (slow['latency_ms'], slow['images_per_s'], slow['peak_memory_mib']) == (None, None, 70.0)
    assert found['resnet18', 'compiled']['peak_memory_mib'] is None


def test_all_out_of_memory_together(monkeypatch):
    fake_processes(monkeypatch, lambda setting: (1.0, 1.0) if setting else OutOfMemoryError())
    (row,) = measure_backbones([Setting('resnet18')], [(224, 224)], 2)
    assert (row['status'], row['latency_ms']) == ('out of memory', None)


def test_what_cannot_be_counted_is_said(monkeypatch):
    fake_processes(monkeypatch, lambda *_: (1.0, 1.0))
    qr = nn.Module()
    qr.forward = lambda x: torch.linalg.qr(x)
    monkeypatch.setattr(benchmark, 'build_backbone', lambda *_: qr)
    (row,) = measure_backbones([Setting('resnet18')], [(224, 224)], 2)
    assert (row['status'], row['macs_g']) == ('ok', None)
    assert 'linalg_qr' in row['not_counted']


def test_sweep_stops_each_at_its_limit(monkeypatch):
    def profile(setting):
        if setting is None:
            return None
        if setting.model == 'pvt_v2_b0' and setting.shape == (128, 128):
            return OutOfMemoryError('x')
        return 1.0, setting.shape[0] / 64  # 4 s at 256

    fake_processes(monkeypatch, profile)
    settings = list_settings(['linglo_b0', 'pvt_v2_b0'], ['fused'])
    shapes = [(size, size) for size in (512, 64, 128, 256, 64)]
    rows = list(measure_backbones(settings, shapes, max_seconds=3))
    found = [(row['model'], row['form'], row['width'], row['status']) for row in rows]
    assert found == [
        ('linglo_b0', 'fused', 64, 'ok'),
        ('pvt_v2_b0', 'trained', 64, 'ok'),
        ('linglo_b0', 'fused', 128, 'ok'),
        ('pvt_v2_b0', 'trained', 128, 'out of memory'),
        ('linglo_b0', 'fused', 256, 'too slow'),
    ]


def test_one_round_is_too_little():
    with pytest.raises(ValueError, match='rounds must be at least 2, got 1'):
        time_steps(dict(a=int), rounds=1)


def row(model, latency, form='trained', engine='eager', width=224, **more):
    return dict(
        model=model,
        latency_ms=latency,
        form=form,
        engine=engine,
        width=width,
        height=width,
        **{**dict(status='ok', top1=70.0, distilled=False), **more},
    )


def test_ratios():
    rows = [
        row('resnet18', 8.0, 'fused'),  # the reference, whatever the order
        row('resnet18', 10.0),
        row('linglo_b0', 4.0),
        row('linglo_b0', 6.0, engine='compiled'),
        row('resnet18', 3.0, engine='compiled'),
        row('linglo_b0', None, width=448),
        row('resnet18', 5.0, width=448),
        row('linglo_b0', 5.0, width=640),
    ]
    add_ratios(rows, 'resnet18')
    assert [r['latency_ratio'] for r in rows] == [1, 1.25, 0.5, 2, 1, None, 1, None]


# --- figures


def test_labels_do_not_cover_each_other():
    axes = Figure().subplots()
    places = dict(first=(1.0, 1.0), second=(1.02, 1.0), third=(1.04, 1.0), far=(2.0, 2.0))
    axes.plot(*zip(*places.values()), 'o')
    points = [(name, *place) for name, place in places.items()]
    figures._label_points(axes, pd.DataFrame(points, columns=['label', 'x', 'y']))
    assert sorted(text.get_text() for text in axes.texts) == sorted(places)
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))
    inside = axes.get_window_extent()
    for box in boxes:
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1


@pytest.mark.parametrize('latency', [12.5, None])
def test_figures_are_written(tmp_path, latency):
    rows = [
        row('linglo_b0', latency, peak_memory_mib=latency, latency_lower_ms=9, latency_upper_ms=13),
        row('pvt_v2_b0', None, peak_memory_mib=9.0, status='too slow'),
        row('linglo_b0_dot_product', latency, top1=None, peak_memory_mib=None, status='crashed')
        | dict(latency_ms=None),
    ]
    rows[0]['status'] = 'ok' if latency else 'out of memory'
    plot_accuracy(rows, 'title', tmp_path / 'new/accuracy')
    plot_sweep(rows, 'title', tmp_path / 'new/sweep')
    for name in ('accuracy', 'sweep'):
        assert (tmp_path / f'new/{name}.png').read_bytes().startswith(b'\x89PNG')


# --- bars


def test_bar_verdicts():
    layer = Layer(1, 2, 3, 4)
    bar = Bar('a', 'time', layer, layer, at_most=0.85)
    at_most = bar.make_row(40.0, 50.0)
    assert (at_most['ratio'], at_most['verdict']) == (0.8, 'met')
    assert at_most['bar'] == 'ours / theirs <= 0.85'
    assert bar.make_row(45.0, 50.0)['verdict'] == 'missed'
    missed = bar.make_row(10.0, 4.0)
    assert missed == dict(
        what='a',
        shape='B 1, N 2, C 3, heads 4',
        unit='ms',
        ours=10.0,
        theirs=4.0,
        ratio=2.5,
        bar='ours / theirs <= 0.85',
        verdict='missed',
    )
    statement = Bar('a', 'time', layer, layer).make_row(30.0, 120.0)
    assert (statement['ratio'], statement['bar'], statement['verdict']) == (0.25, None, None)


def test_attention_layers():
    shapes = [layer[:4] for layer in list_layers()]
    # 224 / 4 = 56, 56 ** 2 = 3136; 800 / 4 * 1344 / 4 = 200 * 336 = 67200; 25 * 42 = 1050
    assert {(1, 3136, 32, 1), (8, 3136, 64, 1), (1, 67200, 64, 1), (1, 1050, 512, 8)} <= set(shapes)
    assert {layer[:4] for layer, *_ in bars.ATTENTION_BARS} <= set(shapes)
    assert len(shapes) == 24  # 4 stages x 3 batches x 2 widths: b2's are b1's


def test_saved_for_backward():
    mebi = 2**18  # float32 numbers in a MiB
    x = torch.randn(mebi, requires_grad=True)
    weight = nn.Parameter(torch.randn(mebi))
    y = torch.randn(2 * mebi)

    def saved(forward, *parameters):
        model = nn.Module()
        model.parameters_ = nn.ParameterList(parameters)
        model.forward = forward
        return measure_saved_mib(model)

    assert saved(lambda: x.exp().sin()) == 1  # of both, the result of exp
    assert saved(lambda: x * weight) == 2
    assert saved(lambda: x * weight, weight) == 1
    assert saved(lambda: x * y[:mebi]) == 2  # a part keeps all of y; no weight, no x
    assert saved(lambda: x + weight) == 0


def test_a_layer_in_the_literal_order():
    """Their outputs agree, and only the literal one executes the products of the definition."""
    for train in (False, True):
        layer = Layer(2, 600, 8, 2, train)  # many positions, few channels: rewritten
        products, results = [], []
        for each in (layer, layer._replace(literal=True)):
            torch.manual_seed(0)
            attention, x = each.build()
            with torch.profiler.profile() as profile:
                output = attention(x)
            names = [event.name for event in profile.events()]
            products.append((names.count('aten::linear'), names.count('aten::baddbmm')))
            step = make_step(attention, x, train_step=train)
            stepped = step()
            gradients = [tensor.grad for tensor in (x, *attention.parameters())]
            results.append([output, *gradients] if train else [output, stepped])
        assert products == [(0, 1), (4, 0)]
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_encodings_of_the_bars(monkeypatch):
    """One convolution, the four branches, and one plain convolution: same maps of the first two."""
    monkeypatch.setattr(peers, 'LinGlo', lambda _, **kwargs: LinGlo(TINY_ARCH, **kwargs))
    outputs, norms = [], []
    for name in ('linglo_b0', 'linglo_b0_branches', 'linglo_b0_plain'):
        torch.manual_seed(1)
        setting = Setting(name, batch_size=2, shape=(64, 64), train_step=True)
        model, images = setting.build()
        layers = [m for m in model.modules() if isinstance(m, (FFN, ConditionalPositionalEncoding))]
        assert {layer.fast for layer in layers} == {False if 'branches' in name else None}
        assert sum(isinstance(layer, FFN) for layer in layers) == 5  # blocks
        outputs.append(model(images))
        norms.append(sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()))
        make_step(model, images, train_step=True)()
        assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(outputs[0], outputs[1])
    assert norms[0] == norms[1] > norms[2] == 0


def test_worst_attention_layer_is_measured_again(monkeypatch):
    """What was disturbed in the few rounds does not count, what is slow in the many does."""
    disturbed, slow = (8, 49, 512, 8), (1, 49, 256, 8)

    def fake(bar, rounds):
        assert rounds in (2, 8)
        ratios = {disturbed: {2: 1.5, 8: 1.0}, slow: {2: 1.1, 8: 1.1}}
        return ratios.get(bar.ours[:4], {}).get(rounds, 0.9), 1.0

    assert {disturbed, slow} <= {layer[:4] for layer in list_layers()}
    monkeypatch.setattr(bars, 'measure_pair', fake)
    for train_step in (False, True):
        row = bars.compare_worst_layer(train_step, 2)
        assert (row['ratio'], row['verdict']) == (pytest.approx(1.1), 'missed')
        assert row['shape'] == 'B 1, N 49, C 256, heads 8'
        assert row['bar'] == 'ours / theirs <= 1.05'
        assert 'worst of 24' in row['what']


@pytest.mark.slow
def test_peak_of_an_attention_layer():
    large, small = bars.measure_pair(Bar('growth', 'peak', *bars.GROWTH_LAYERS[::-1]), 2)
    maps = 8 * 3136 * 64 * 4 / 2**20
    assert small > 4 * maps  # x, output, their gradients
    assert 3 < large / small < bars.GROWTH
