# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The project's performance bars, each a ratio of two measurements in one run, in float32 on the CPU."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Tuple
from unittest import mock

import torch
from torch import Tensor, nn

from mmlinglo import LinGlo
from mmlinglo.analysis.backbones import BACKBONES, PooledBackbone, build_backbone
from mmlinglo.analysis.benchmark import make_step
from mmlinglo.analysis.complexity import count_complexity
from mmlinglo.analysis.execution import Execution
from mmlinglo.analysis.memory import MIB, call_in_fresh_process, peak_memory_mib
from mmlinglo.analysis.timing import Timing, measure
from mmlinglo.models.layers import ConditionalPositionalEncoding, KeyOnlyAttention
from mmlinglo.models.layers import positional_encoding as cpe
from mmlinglo.models.layers.patch_moments import patch_moments

Step = Callable[[], object]
AttentionShape = Tuple[int, int, int, int]  # batch, positions, channels, heads
Pair = Tuple[float, float]  # ours, theirs

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
# LinGlo, peer, our share of the peer's time at 224 x 224 (batch 8) and 800 x 1344 (batch 1).
PEER_BARS = (
    ('linglo_b0', 'pvt_v2_b0', 0.85, 0.42),
    ('linglo_b1', 'pvt_v2_b1', 0.95, 0.42),
    ('linglo_b2', 'pvt_v2_b2', 0.95, 0.42),
)
CLASSIFICATION, DETECTION = (224, 224), (800, 1344)
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


@dataclass(frozen=True)
class Bar:
    """Two measurements, their ratio, and what it should be.

    Attributes:
        what: What is compared with what.
        shape: Of what was measured.
        unit: Of both measurements.
        ours: This code's.
        theirs: What it is compared with.
        at_most: Largest ratio of ours to theirs that meets the bar.
        at_least: Smallest ratio of theirs to ours that meets it. With neither the
            ratio of ours to theirs is a mere statement.
    """

    what: str
    shape: str
    unit: str
    ours: float
    theirs: float
    at_most: Optional[float] = None
    at_least: Optional[float] = None

    @property
    def ratio(self) -> float:
        """Theirs to ours with :attr:`at_least`, else ours to theirs."""
        return self.ours / self.theirs if self.at_least is None else self.theirs / self.ours

    @property
    def met(self) -> Optional[bool]:
        """Whether the bar is met; None if there is none."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return None if self.at_most is None else self.ratio <= self.at_most

    def row(self) -> dict:
        """Line of a report."""
        bar = None
        if self.at_least is not None:
            bar = f'theirs / ours >= {self.at_least:.3g}'
        elif self.at_most is not None:
            bar = f'ours / theirs <= {self.at_most:.3g}'
        verdict = {True: 'met', False: 'missed', None: None}[self.met]
        return dict(
            what=self.what,
            shape=self.shape,
            unit=self.unit,
            ours=self.ours,
            theirs=self.theirs,
            ratio=self.ratio,
            bar=bar,
            verdict=verdict,
        )


def measure_bars(execution: Execution, rounds: int = 7) -> Iterator[Bar]:
    """Measure all bars, group by group.

    Whole networks are measured in fresh processes: what malloc does with large
    blocks depends on those before, and the time of those who need them on that.

    Args:
        execution: Its threads count; the rest is set by the bars.
        rounds: Rounds of timing for each pair, at least 2.

    Yields:
        The bars, as they are measured.

    Raises:
        ValueError: If there are fewer than 2 rounds.
    """
    if rounds < 2:
        raise ValueError(f'rounds must be at least 2, got {rounds}')
    execution.prepare_process()
    yield from attention_speed(rounds)
    yield from attention_never_slower(rounds)
    yield from attention_memory(execution)
    yield from positional_encoding(execution, rounds)
    yield from peers(execution, rounds)
    yield from training_step(execution, rounds)
    yield matrix_peak_share(rounds)


def attention_speed(rounds: int) -> Iterator[Bar]:
    """One key-only attention layer against its literal order (Eq. 2-4): deployed, and in training."""
    for shape, forward, both in ATTENTION_BARS:
        for train_step, at_least in ((False, forward), (True, both)):
            ours, theirs = _attention_times(shape, train_step, rounds)
            yield Bar(
                _attention_title(train_step),
                _attention_shape(shape),
                'ms',
                ours,
                theirs,
                at_least=at_least,
            )


def attention_never_slower(rounds: int) -> Iterator[Bar]:
    """The worst of all attention shapes of b0, b1, b2 at 224 (batch 1, 8) and 800 x 1344 (batch 1).

    The largest of many noisy ratios is mostly noise, so the four shapes that look
    worst are measured once more, in four times the rounds, and these count.
    """
    for train_step in (False, True):
        times = {shape: _attention_times(shape, train_step, rounds) for shape in attention_shapes()}

        def ratio(shape: AttentionShape, times: Dict[AttentionShape, Pair] = times) -> float:
            return times[shape][0] / times[shape][1]

        suspects = sorted(times, key=ratio)[-4:]
        times.update({s: _attention_times(s, train_step, 4 * rounds) for s in suspects})
        worst = max(suspects, key=ratio)
        yield Bar(
            f'{_attention_title(train_step)}, worst of {len(times)} shapes',
            _attention_shape(worst),
            'ms',
            *times[worst],
            at_most=NEVER_SLOWER,
        )


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


def attention_memory(execution: Execution) -> Iterator[Bar]:
    """Memory of one key-only attention layer, forward and backward: its growth, and the literal order's."""
    peaks: Dict[str, List[float]] = {}
    for order in ('forward', '_forward_literal'):
        peaks[order] = [
            call_in_fresh_process(_attention_peak, order, shape, execution)
            for shape in GROWTH_SHAPES
        ]
    small, large = peaks['forward']
    (_, few, *_), (_, many, *_) = GROWTH_SHAPES
    yield Bar(
        f'attention layer, peak memory of forward + backward at N = {many} (ours) and {few} (theirs)',
        _attention_shape(GROWTH_SHAPES[1]),
        'MiB',
        large,
        small,
        at_most=GROWTH,
    )
    for shape, ours, theirs in zip(GROWTH_SHAPES, peaks['forward'], peaks['_forward_literal']):
        yield Bar(
            'attention layer against its literal order, peak memory of forward + backward',
            _attention_shape(shape),
            'MiB',
            ours,
            theirs,
            at_most=1.0,
        )
        attn, x = _attention(shape)
        yield Bar(
            'attention layer against its literal order, kept for the backward',
            _attention_shape(shape),
            'MiB',
            saved_mib(partial(attn, x), attn.parameters()),
            saved_mib(partial(attn._forward_literal, x), attn.parameters()),
            at_most=1.0,
        )


def positional_encoding(execution: Execution, rounds: int) -> Iterator[Bar]:
    """Training of LinGlo-b0 with RP-CPE as one convolution against its four branches."""
    times, kept = call_in_fresh_process(_encoding_costs, execution, rounds)
    ours, theirs, least, statistics = times
    what, where = (
        'LinGlo-b0, RP-CPE as one convolution against four branches',
        _shape(16, CLASSIFICATION),
    )
    yield Bar(f'{what}, forward + backward', where, 'ms', ours, theirs, at_most=0.45)
    yield Bar(
        'LinGlo-b0, one plain convolution without norm against four branches, forward + backward',
        where,
        'ms',
        least,
        theirs,
    )
    yield Bar(
        'LinGlo-b0, moments of the patches and their gradient alone against four branches, forward + backward',
        where,
        'ms',
        statistics,
        theirs,
    )
    yield Bar(f'{what}, kept for the backward', where, 'MiB', *kept, at_most=0.5)


def _encoding_costs(execution: Execution, rounds: int) -> Tuple[Tuple[float, ...], Pair]:
    """Milliseconds of ours, the four branches, the least there can be, and the moments; MiB of the first two."""
    execution.prepare_process()
    model = PooledBackbone(LinGlo('b0', out_indices=-1)).train()
    plain = LinGlo('b0', out_indices=-1, pos_encoding='CPE', norm_cfg=None)
    images = torch.randn(16, 3, *CLASSIFICATION)
    step = make_step(model, images, train_step=True)
    steps = dict(
        ours=step,
        theirs=_in_context(step, literal_branches),
        least=make_step(PooledBackbone(plain).train(), images, train_step=True),
        moments=_moments_step(model, images),
    )
    times = measure(steps, rounds=rounds, warmup=2)
    forward = partial(model, images)
    kept = (forward, _in_context(forward, literal_branches))
    return (
        tuple(1e3 * times[name].median for name in steps),
        tuple(saved_mib(step, model.parameters()) for step in kept),
    )


def _moments_step(model: nn.Module, images: Tensor) -> Step:
    """What batch norms cost in RP-CPE as one convolution: the moments of all maps that it reads."""
    maps = []

    def record(x: Tensor, *_: object) -> Tuple[Tensor, Tensor]:
        maps.append(x.detach().requires_grad_())
        return patch_moments(x)

    with torch.no_grad(), mock.patch.object(cpe, 'patch_moments', record):
        model(images)

    def step() -> None:
        for x in maps:
            moments = patch_moments(x)
            torch.autograd.grad(moments, x, tuple(torch.ones_like(moment) for moment in moments))

    return step


def peers(execution: Execution, rounds: int) -> Iterator[Bar]:
    """Deployed LinGlo against timm's PVTv2 and ConvNeXt."""
    for shape, batch_size in ((CLASSIFICATION, 8), (DETECTION, 1)):
        bars = [
            (ours, theirs, small if shape == CLASSIFICATION else large)
            for ours, theirs, small, large in PEER_BARS
        ]
        if shape == CLASSIFICATION:
            bars.append(('linglo_b2', 'convnext_tiny', 1.25))
        names = dict.fromkeys(name for pair in bars for name in pair[:2])
        setting = replace(execution, batch_size=batch_size)
        times = call_in_fresh_process(_peer_times, list(names), shape, setting, rounds)
        for ours, theirs, at_most in bars:
            yield Bar(
                f'{BACKBONES[ours].label} deployed against {BACKBONES[theirs].label}, '
                + ('four maps' if shape == DETECTION else 'pooled features'),
                _shape(batch_size, shape),
                'ms',
                1e3 * times[ours].median,
                1e3 * times[theirs].median,
                at_most=at_most,
            )


def _peer_times(
    names: List[str], shape: Tuple[int, int], execution: Execution, rounds: int
) -> Dict[str, Timing]:
    execution.prepare_process()
    images = torch.randn(execution.batch_size, 3, *shape)
    steps = {
        name: make_step(
            build_backbone(name, shape, shape == DETECTION, BACKBONES[name].fusion is not None),
            images,
            train_step=False,
        )
        for name in names
    }
    return measure(steps, rounds=rounds, warmup=1)


def training_step(execution: Execution, rounds: int) -> Iterator[Bar]:
    """Forward and backward of LinGlo-b0 against PVTv2-B0's."""
    yield Bar(
        'LinGlo-b0 against PVTv2-B0, forward + backward',
        _shape(16, CLASSIFICATION),
        'ms',
        *call_in_fresh_process(_training_times, execution, rounds),
        at_most=1.3,
    )


def _training_times(execution: Execution, rounds: int) -> Pair:
    execution.prepare_process()
    images = torch.randn(16, 3, *CLASSIFICATION)
    steps = [
        make_step(build_backbone(name, CLASSIFICATION).train(), images, train_step=True)
        for name in ('linglo_b0', 'pvt_v2_b0')
    ]
    return _times(*steps, rounds)


def matrix_peak_share(rounds: int) -> Bar:
    """Operations a second of deployed LinGlo-b1, and of a large product of matrices."""
    model = build_backbone('linglo_b1', CLASSIFICATION, fused=True)
    images = torch.randn(8, 3, *CLASSIFICATION)
    macs = count_complexity(model, images).macs
    first, second, out = (torch.randn(MATRIX_SIZE, MATRIX_SIZE) for _ in range(3))
    model_ms, product_ms = _times(
        make_step(model, images, train_step=False),
        lambda: torch.mm(first, second, out=out),
        rounds,
    )
    return Bar(
        f'LinGlo-b1 deployed, of the speed of a product of {MATRIX_SIZE}-wide matrices',
        _shape(8, CLASSIFICATION),
        'GFLOP/s',
        2e-6 * macs / model_ms,
        2e-6 * MATRIX_SIZE**3 / product_ms,
    )


@contextmanager
def literal_branches() -> Iterator[None]:
    """Compute all positional encodings branch by branch, as the paper writes them (Fig. 2)."""
    # Also for the networks around them, which do what is linear in an order of their own.
    with mock.patch.object(ConditionalPositionalEncoding, 'is_linear', False):
        yield


def saved_mib(forward: Step, parameters: Iterable[nn.Parameter]) -> float:
    """Memory in MiB that autograd keeps from a forward pass for the backward.

    Each piece of memory counts once, whichever tensors share it; that of the
    parameters does not count.

    Args:
        forward: The pass.
        parameters: Of the model.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}  # of storages, not their sizes: the memory of none may be given to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values()) / MIB


def _attention(shape: AttentionShape) -> Tuple[KeyOnlyAttention, Tensor]:
    """Layer in training mode, and tokens that need a gradient as they do inside a network."""
    batch_size, positions, channels, heads = shape
    attn = KeyOnlyAttention(channels, heads).train()
    return attn, torch.randn(batch_size, positions, channels, requires_grad=True)


def _attention_step(attn: KeyOnlyAttention, order: str, x: Tensor, train_step: bool = True) -> Step:
    forward = getattr(attn, order)

    @torch.inference_mode()
    def infer() -> Tensor:
        return forward(x)

    gradient = x.detach()  # any
    inputs = [x, *attn.parameters()]

    def train() -> Tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x), inputs, gradient)

    return train if train_step else infer


def _attention_times(shape: AttentionShape, train_step: bool, rounds: int) -> Pair:
    attn, x = _attention(shape)
    if not train_step:
        attn.eval().switch_to_deploy()
    steps = (
        _attention_step(attn, order, x, train_step) for order in ('forward', '_forward_literal')
    )
    return _times(*steps, rounds)


def _attention_peak(order: str, shape: AttentionShape, execution: Execution) -> float:
    execution.prepare_process()

    def build(shape: AttentionShape = shape) -> Step:
        attn, x = _attention(shape)
        return _attention_step(attn, order, x)

    build((1, 256, *shape[2:]))()
    return peak_memory_mib(build, 'cpu')


def _times(ours: Step, theirs: Step, rounds: int) -> Pair:
    """Medians in milliseconds."""
    times = measure(dict(ours=ours, theirs=theirs), rounds=rounds, warmup=2)
    return 1e3 * times['ours'].median, 1e3 * times['theirs'].median


def _in_context(step: Step, context: Callable[[], object]) -> Step:
    def call() -> object:
        with context():
            return step()

    return call


def _attention_title(train_step: bool) -> str:
    passes = 'forward + backward' if train_step else 'deployed, forward'
    return f'attention layer against its literal order, {passes}'


def _attention_shape(shape: AttentionShape) -> str:
    return 'B {}, N {}, C {}, heads {}'.format(*shape)


def _shape(batch_size: int, shape: Tuple[int, int]) -> str:
    return f'B {batch_size}, {shape[0]} x {shape[1]}'
