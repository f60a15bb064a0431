# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The project's performance bars: ratios of two measurements in one run, in float32 on the CPU.

The definition that a rewriting is compared with is the same module under :func:`mmlinglo.literal`.
"""

from functools import partial
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mmlinglo
from mmlinglo import KeyOnlyAttention, LinGlo
from mmlinglo.analysis.benchmark import Setting, Step, make_step, time_steps
from mmlinglo.analysis.memory import MIB, call_in_fresh_process, peak_memory_mib
from mmlinglo.analysis.peers import PEERS, Plain, build_backbone

AttentionShape = Tuple[int, int, int, int]  # batch, positions, channels, heads

# How many times faster than the literal order: forward, and forward + backward.
ATTENTION_BARS = (
    ((8, 3136, 64, 1), 3.0, 2.3),
    ((1, 4200, 320, 5), 3.0, 2.3),
    ((8, 784, 128, 2), 2.5, 2.3),
    ((1, 16800, 128, 2), 2.5, 2.3),
)
NEVER_SLOWER = 1 / 0.95  # of the literal order's time, at any shape
GROWTH_SHAPES = ((8, 3136, 64, 1), (8, 12544, 64, 1))  # four times the positions
GROWTH = 4.4  # of memory at most: linear, and a tenth
CLASSIFICATION, DETECTION = (224, 224), (800, 1344)
# Ours, theirs, size and number of the images, and our share of their time at most.
PEER_BARS = (
    ('linglo_b0', 'pvt_v2_b0', CLASSIFICATION, 8, 0.85),
    ('linglo_b1', 'pvt_v2_b1', CLASSIFICATION, 8, 0.95),
    ('linglo_b2', 'pvt_v2_b2', CLASSIFICATION, 8, 0.95),
    ('linglo_b2', 'convnext_tiny', CLASSIFICATION, 8, 1.25),
    ('linglo_b0', 'pvt_v2_b0', DETECTION, 1, 0.42),
    ('linglo_b1', 'pvt_v2_b1', DETECTION, 1, 0.42),
    ('linglo_b2', 'pvt_v2_b2', DETECTION, 1, 0.42),
)
TRAINING_STEP = 1.4  # of PVTv2-B0's time at most
ENCODING = 0.5  # of the four branches' time, and memory kept for the backward, at most
ENCODINGS = ('RP-CPE', 'branches', 'plain convolution')
MATRIX_SIZE = 2048
COLUMNS = dict(
    what='What',
    shape='Shape',
    unit='Unit',
    ours='Ours',
    theirs='Theirs',
    ratio='Ratio',
    bar='Bar',
    verdict='Verdict',
)
"""Columns of a printed table, and their headings."""


class Bar(NamedTuple):
    """Two measurements, and what their ratio should be.

    Attributes:
        what: What is compared with what.
        shape: Of what was measured.
        unit: Of both measurements.
        ours: This code's.
        theirs: What it is compared with.
        at_most: Largest ratio of ours to theirs that meets the bar.
        at_least: Smallest ratio of theirs to ours that does. With neither the ratio is a mere statement.
    """

    what: str
    shape: str
    unit: str
    ours: float
    theirs: float
    at_most: Optional[float] = None
    at_least: Optional[float] = None

    def row(self) -> dict:
        """Line of a report."""
        ratio = self.ours / self.theirs
        bar = verdict = None
        if self.at_least is not None:
            ratio = 1 / ratio
            bar, met = f'theirs / ours >= {self.at_least:.3g}', ratio >= self.at_least
        elif self.at_most is not None:
            bar, met = f'ours / theirs <= {self.at_most:.3g}', ratio <= self.at_most
        if bar is not None:
            verdict = 'met' if met else 'missed'
        return dict(zip(COLUMNS, (*self[:5], ratio, bar, verdict)))


def measure_bars(threads: int = 2, rounds: int = 7) -> Iterator[Bar]:
    """Measure all bars, group by group.

    Whole networks are measured in fresh processes: what malloc does with large blocks depends on those
    before, and the time of those who need them on that.

    Args:
        threads: CPU threads.
        rounds: Rounds of timing for each pair, at least 2.

    Raises:
        ValueError: If there are fewer than 2 rounds, or less than 1 thread.
    """
    Setting(threads=threads).prepare_process()
    yield from attention_speed(rounds)
    yield from attention_memory(threads)
    yield from encodings(threads, rounds)
    for ours, theirs, shape, batch_size, at_most in PEER_BARS:
        builds = [partial(network, name, shape, batch_size) for name in (ours, theirs)]
        times = call_in_fresh_process(times_of, builds, threads, rounds)
        outputs = 'four maps' if shape == DETECTION else 'pooled features'
        what = f'{PEERS[ours].label} deployed against {PEERS[theirs].label}, {outputs}'
        yield Bar(what, _shape(batch_size, shape), 'ms', *times, at_most=at_most)
    builds = [partial(network, name, train=True) for name in ('linglo_b0', 'pvt_v2_b0')]
    times = call_in_fresh_process(times_of, builds, threads, rounds)
    what, where = 'LinGlo-b0 against PVTv2-B0, forward + backward', _shape(16, CLASSIFICATION)
    yield Bar(what, where, 'ms', *times, at_most=TRAINING_STEP)
    yield matrix_peak_share(rounds)


def attention_speed(rounds: int) -> Iterator[Bar]:
    """One key-only attention layer against its literal order (Eq. 2-4): deployed, and in training.

    Never slower means the worst of all shapes of b0, b1, b2 at 224 (batch 1, 8) and 800 x 1344 (batch 1).
    The largest of many noisy ratios is mostly noise, so the four shapes that look worst are measured once
    more, in four times the rounds, and these count.
    """
    what = 'attention layer against its literal order'
    titles = {False: f'{what}, deployed, forward', True: f'{what}, forward + backward'}
    for shape, *bars in ATTENTION_BARS:
        for (train, title), at_least in zip(titles.items(), bars):
            pair = attention_times(shape, train, rounds)
            yield Bar(title, _attention_shape(shape), 'ms', *pair, at_least=at_least)
    for train, title in titles.items():
        times = {shape: attention_times(shape, train, rounds) for shape in attention_shapes()}

        def ratio(shape: AttentionShape, times: dict = times) -> float:
            return times[shape][0] / times[shape][1]

        suspects = sorted(times, key=ratio)[-4:]
        times.update({shape: attention_times(shape, train, 4 * rounds) for shape in suspects})
        worst = max(suspects, key=ratio)
        where, title = _attention_shape(worst), f'{title}, worst of {len(times)} shapes'
        yield Bar(title, where, 'ms', *times[worst], at_most=NEVER_SLOWER)


def attention_shapes() -> List[AttentionShape]:
    """Batch, positions, channels and heads of each stage of b0, b1, b2 at the sizes of the bars."""
    shapes = []
    for name in ('b0', 'b1', 'b2'):
        arch = LinGlo.arch_zoo[name]
        for batch, (height, width) in ((1, CLASSIFICATION), (8, CLASSIFICATION), (1, DETECTION)):
            for stage, channels in enumerate(arch['embed_dims']):
                stride = 4 * 2**stage
                positions = -(-height // stride) * -(-width // stride)
                shapes.append((batch, positions, channels, arch['num_heads'][stage]))
    return list(dict.fromkeys(shapes))


def attention_times(shape: AttentionShape, train: bool, rounds: int) -> List[float]:
    """Milliseconds of an attention layer, and of its literal order."""
    steps = {literal: attention(shape, literal, train).step for literal in (False, True)}
    return [median for _, median, _ in time_steps(steps, rounds, warmup=2).values()]


def attention_memory(threads: int) -> Iterator[Bar]:
    """Memory of one key-only attention layer, forward and backward: its growth, and the literal order's."""
    shapes, wheres = GROWTH_SHAPES, [_attention_shape(shape) for shape in GROWTH_SHAPES]
    ours, theirs = (
        [call_in_fresh_process(attention_peak, shape, literal, threads) for shape in shapes]
        for literal in (False, True)
    )
    what = 'attention layer, peak memory of forward + backward at N = {} (ours) and {} (theirs)'
    what = what.format(shapes[1][1], shapes[0][1])
    yield Bar(what, wheres[1], 'MiB', ours[1], ours[0], at_most=GROWTH)
    what = 'attention layer against its literal order'
    for shape, where, *peaks in zip(shapes, wheres, ours, theirs):
        yield Bar(f'{what}, peak memory of forward + backward', where, 'MiB', *peaks, at_most=1.0)
        kept = [saved_mib(attention(shape, literal)) for literal in (False, True)]
        yield Bar(f'{what}, kept for the backward', where, 'MiB', *kept, at_most=1.0)


def encodings(threads: int, rounds: int) -> Iterator[Bar]:
    """Training of LinGlo-b0 with RP-CPE as one convolution against its four branches."""
    where, against = _shape(16, CLASSIFICATION), 'against four branches'
    ours, branches, plain = (
        partial(network, 'linglo_b0', train=True, encoding=encoding) for encoding in ENCODINGS
    )
    what = f'LinGlo-b0, RP-CPE as one convolution {against}'
    times = call_in_fresh_process(times_of, [ours, branches, plain], threads, rounds)
    yield Bar(f'{what}, forward + backward', where, 'ms', *times[:2], at_most=ENCODING)
    least = f'LinGlo-b0, one plain convolution without norm {against}, forward + backward'
    yield Bar(least, where, 'ms', times[2], times[1])
    kept = [saved_mib(build()) for build in (ours, branches)]
    yield Bar(f'{what}, kept for the backward', where, 'MiB', *kept, at_most=ENCODING)


def matrix_peak_share(rounds: int) -> Bar:
    """Operations a second of deployed LinGlo-b1, of those that it executes, and of a large product."""
    work = network('linglo_b1', CLASSIFICATION, 8)
    # With gradients: PyTorch's counter does not know the operators that take over without.
    with FlopCounterMode(display=False) as counter:
        work.forward()
    first, second, out = (torch.randn(MATRIX_SIZE, MATRIX_SIZE) for _ in range(3))
    steps = dict(model=work.step, product=lambda: torch.mm(first, second, out=out))
    times = time_steps(steps, rounds, warmup=2)
    what = f'LinGlo-b1 deployed, of the speed of a product of {MATRIX_SIZE}-wide matrices'
    ours = 1e-6 * counter.get_total_flops() / times['model'][1]
    theirs = 2e-6 * MATRIX_SIZE**3 / times['product'][1]
    return Bar(what, _shape(8, CLASSIFICATION), 'GFLOP/s', ours, theirs)


class Literally(nn.Module):
    """A layer that is computed as the paper writes it; those around it cannot rewrite it either."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with mmlinglo.literal():
            return self.layer(*args, **kwargs)


class Work(NamedTuple):
    """A forward pass, the step to measure, and the model's parameters."""

    forward: Step
    step: Step
    parameters: Tuple[nn.Parameter, ...]


def attention(shape: AttentionShape, literal: bool = False, train: bool = True) -> Work:
    """One key-only attention layer on tokens that need a gradient, as inside a network."""
    batch_size, positions, channels, heads = shape
    attn = KeyOnlyAttention(channels, heads).train()
    x = torch.randn(batch_size, positions, channels, requires_grad=True)
    gradient, inputs = x.detach(), (x, *attn.parameters())  # any gradient
    forward = partial(Literally(attn) if literal else attn, x)
    if train:
        return Work(forward, lambda: torch.autograd.grad(forward(), inputs, gradient), inputs[1:])
    attn.eval().switch_to_deploy()
    return Work(forward, torch.inference_mode()(forward), inputs[1:])


def network(
    name: str,
    shape: Tuple[int, int] = CLASSIFICATION,
    batch_size: int = 16,
    train: bool = False,
    encoding: str = 'RP-CPE',
) -> Work:
    """A backbone in its fused form, or in training, on random images; ``encoding`` is one of ENCODINGS."""
    maps, fused = shape == DETECTION, PEERS[name].fused and not train
    model = build_backbone(name, shape, maps, fused).train(train)
    if encoding == 'branches':
        for ffn in list(model.modules()):
            if isinstance(getattr(ffn, 'pos_encoding', None), nn.Module):
                ffn.pos_encoding = Literally(ffn.pos_encoding)
    elif encoding == 'plain convolution':
        plain = LinGlo('b0', out_indices=-1, pos_encoding='CPE', norm_cfg=None)
        model = Plain(plain, maps).train(train)
    images = torch.randn(batch_size, 3, *shape)
    step = make_step(model, images, train)
    return Work(partial(model, images), step, tuple(model.parameters()))


def times_of(builds: List[Callable[[], Work]], threads: int, rounds: int) -> List[float]:
    """Milliseconds of each, in interleaved rounds."""
    Setting(threads=threads).prepare_process()
    steps = {number: build().step for number, build in enumerate(builds)}
    return [median for _, median, _ in time_steps(steps, rounds, warmup=2).values()]


def attention_peak(shape: AttentionShape, literal: bool, threads: int) -> float:
    """MiB of forward and backward of an attention layer."""
    Setting(threads=threads).prepare_process()
    attention((1, 256, *shape[2:]), literal).step()
    return peak_memory_mib(lambda: attention(shape, literal).step, 'cpu')


def saved_mib(work: Work) -> float:
    """Memory in MiB that autograd keeps from a forward pass for the backward.

    Each piece of memory counts once, whichever tensors share it; that of the parameters does not count.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in work.parameters}
    kept = {}  # of storages, not their sizes: the memory of none may be given to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work.forward()
    return sum(storage.nbytes() for storage in kept.values()) / MIB


def _attention_shape(shape: AttentionShape) -> str:
    return 'B {}, N {}, C {}, heads {}'.format(*shape)


def _shape(batch_size: int, shape: Tuple[int, int]) -> str:
    return f'B {batch_size}, {shape[0]} x {shape[1]}'
