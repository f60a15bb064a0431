# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The project's performance bars: ratios of two measurements in one run, in float32 on the CPU.

The literal order that a rewriting is compared with is the same module with ``fast=False``.
"""

import math
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from mmlinglo import KeyOnlyAttention, LinGlo
from mmlinglo.analysis import benchmark
from mmlinglo.analysis.benchmark import Setting, make_step, profile, time_settings
from mmlinglo.analysis.launches import SavedTensors
from mmlinglo.analysis.memory import MIB, call_in_fresh_process
from mmlinglo.analysis.peers import PEERS


class Layer(NamedTuple):
    """A key-only attention layer, on tokens that need a gradient, as inside a network."""

    batch: int
    positions: int
    channels: int
    heads: int
    train_step: bool = True  # forward and backward
    literal: bool = False  # in the order of the paper's Eq. 2-4

    def __str__(self) -> str:
        return 'B {}, N {}, C {}, heads {}'.format(*self)

    def build(self) -> Tuple[nn.Module, Tensor]:
        """Build the layer and the tokens, (B, N, C)."""
        layer = KeyOnlyAttention(self.channels, self.heads).train(self.train_step)
        layer.fast = False if self.literal else None
        return layer, torch.randn(self.batch, self.positions, self.channels, requires_grad=True)

    def build_step(self) -> benchmark.Step:
        """Build the step of both."""
        return make_step(*self.build(), train_step=self.train_step)


DEPLOYED, STEP, KEPT = 'deployed, forward', 'forward + backward', 'kept for the backward'
LITERALLY = 'attention layer against its literal order'
# And our share of the literal order's time at most: deployed, and in training.
ATTENTION_BARS = (
    (Layer(8, 3136, 64, 1), 1 / 3, 1 / 2.3),
    (Layer(1, 4200, 320, 5), 1 / 3, 1 / 2.3),
    (Layer(8, 784, 128, 2), 1 / 2.5, 1 / 2.3),
    (Layer(1, 16800, 128, 2), 1 / 2.5, 1 / 2.3),
)
NEVER_SLOWER = 1 / 0.95  # of the literal order's time, at any shape
GROWTH_LAYERS = (Layer(8, 3136, 64, 1), Layer(8, 12544, 64, 1))  # four times the positions
GROWTH = 4.4  # of memory at most: linear, and a tenth
CLASSIFICATION, DETECTION = (224, 224), (800, 1344)
WORKS: Dict[str, Dict[str, Any]] = {
    'pooled features': dict(shape=CLASSIFICATION, batch_size=8),
    'four maps': dict(shape=DETECTION, maps=True),
    STEP: dict(shape=CLASSIFICATION, batch_size=16, train_step=True),
}
# Ours, theirs, and our share of their time at most; deployed, but for STEP.
PEER_BARS = (
    ('linglo_b0', 'pvt_v2_b0', 'pooled features', 0.85),
    ('linglo_b1', 'pvt_v2_b1', 'pooled features', 0.95),
    ('linglo_b2', 'pvt_v2_b2', 'pooled features', 0.95),
    ('linglo_b2', 'convnext_tiny', 'pooled features', 1.25),
    ('linglo_b0', 'pvt_v2_b0', 'four maps', 0.42),
    ('linglo_b1', 'pvt_v2_b1', 'four maps', 0.42),
    ('linglo_b2', 'pvt_v2_b2', 'four maps', 0.42),
    ('linglo_b0', 'pvt_v2_b0', STEP, 1.4),
)
ENCODING = 0.5  # of the four branches' time, and memory kept for the backward, at most
UNITS = dict(time='ms', peak='MiB', kept='MiB')
COLUMNS = ('what', 'shape', 'unit', 'ours', 'theirs', 'ratio', 'bar', 'verdict')


class Bar(NamedTuple):
    """Two things to measure, and what their ratio should be; it may have no limit."""

    what: str  # is compared with what
    quantity: str  # of UNITS: time or peak memory of a step, or memory kept for the backward
    ours: Any  # a Layer or Setting, as is the next one
    theirs: Any
    at_most: Optional[float] = None  # of ours / theirs

    def make_row(self, ours: float, theirs: float) -> Dict[str, Any]:
        """Make the row of two measurements, with :data:`COLUMNS`."""
        ratio, bar, verdict = ours / theirs, None, None
        if self.at_most is not None:
            verdict = 'met' if ratio <= self.at_most else 'missed'
            bar = f'ours / theirs <= {self.at_most:.3g}'
        what = (self.what, str(self.ours), UNITS[self.quantity])
        return dict(zip(COLUMNS, (*what, ours, theirs, ratio, bar, verdict)))


def measure_bars(rounds: int) -> Iterator[Dict[str, Any]]:
    """Measure all bars in this many rounds of timing, at least 2; yield :meth:`Bar.make_row`."""
    for bar in list_bars():
        yield bar.make_row(*measure_pair(bar, rounds))
    for train_step in (False, True):
        yield compare_worst_layer(train_step, rounds)


def list_bars() -> Iterator[Bar]:
    """List all bars but those of :func:`compare_worst_layer`."""
    for layer, *limits in ATTENTION_BARS:
        for work, at_most in zip((DEPLOYED, STEP), limits):
            ours = layer._replace(train_step=work == STEP)
            yield Bar(f'{LITERALLY}, {work}', 'time', ours, ours._replace(literal=True), at_most)
    small, large = GROWTH_LAYERS
    numbers = f'N = {large.positions} (ours) and {small.positions} (theirs)'
    yield Bar(f'attention layer, peak memory of {STEP} at {numbers}', 'peak', large, small, GROWTH)
    for ours in GROWTH_LAYERS:
        theirs = ours._replace(literal=True)
        yield Bar(f'{LITERALLY}, peak memory of {STEP}', 'peak', ours, theirs, at_most=1.0)
        yield Bar(f'{LITERALLY}, {KEPT}', 'kept', ours, theirs, at_most=1.0)
    names = ('linglo_b0', 'linglo_b0_branches', 'linglo_b0_plain')
    rp_cpe, branches, plain = (Setting(name, **WORKS[STEP]) for name in names)
    what, against = 'LinGlo-b0, RP-CPE as one convolution', 'against four branches'
    yield Bar(f'{what} {against}, {STEP}', 'time', rp_cpe, branches, at_most=ENCODING)
    least = f'LinGlo-b0, one plain convolution without norm {against}, {STEP}'
    yield Bar(least, 'time', plain, branches)
    yield Bar(f'{what} {against}, {KEPT}', 'kept', rp_cpe, branches, at_most=ENCODING)
    for ours_name, theirs_name, work, at_most in PEER_BARS:
        mine, peer = PEERS[ours_name], PEERS[theirs_name]
        deployed, how = (False, '') if work == STEP else (True, ' deployed')
        us = Setting(ours_name, mine.fused and deployed, **WORKS[work])
        them = Setting(theirs_name, peer.fused and deployed, **WORKS[work])
        yield Bar(f'{mine.label}{how} against {peer.label}, {work}', 'time', us, them, at_most)


def measure_pair(bar: Bar, rounds: int) -> List[float]:
    """Measure both things, in the unit of the bar.

    Whole networks are timed in a fresh process: what malloc does with large blocks depends on those
    before, and the time of those who need them on that.
    """
    pair = (bar.ours, bar.theirs)
    if bar.quantity == 'kept':
        return [measure_saved_mib(*each.build()) for each in pair]
    if bar.quantity == 'peak':
        calls = [(profile, each._replace(batch=1, positions=256), each) for each in pair]
        return [call_in_fresh_process(*call)[0] for call in calls]
    if isinstance(bar.ours, Layer):
        times = time_settings(pair, rounds)
    else:
        times = call_in_fresh_process(time_settings, pair, rounds)
    return [times[each][1] for each in pair]


def measure_saved_mib(model: nn.Module, *inputs: Tensor) -> float:
    """Measure the memory in MiB that autograd keeps from a forward pass for the backward."""
    saved = SavedTensors()
    with saved:
        model(*inputs)
    return saved.count_bytes(model) / MIB


def list_layers() -> List[Layer]:
    """List the attention layers of each stage of b0, b1, b2 at the sizes of the bars."""
    layers = []
    for arch in (LinGlo.arch_zoo[name] for name in ('b0', 'b1', 'b2')):
        for batch, size in ((1, CLASSIFICATION), (8, CLASSIFICATION), (1, DETECTION)):
            for stage, channels in enumerate(arch['embed_dims']):
                height, width = (math.ceil(length / 2 ** (stage + 2)) for length in size)
                layers.append(Layer(batch, height * width, channels, arch['num_heads'][stage]))
    return list(dict.fromkeys(layers))


def compare_worst_layer(train_step: bool, rounds: int) -> Dict[str, Any]:
    """Compare the attention layer that loses most by the rewriting with its literal order.

    The largest of many noisy ratios is mostly noise, so the four shapes that look worst are measured once
    more, in four times the rounds, and these count.
    """
    layers = [layer._replace(train_step=train_step) for layer in list_layers()]
    what = f'{LITERALLY}, {STEP if train_step else DEPLOYED}, worst of {len(layers)} shapes'
    bars = [Bar(what, 'time', x, x._replace(literal=True), at_most=NEVER_SLOWER) for x in layers]
    rows = [bar.make_row(*measure_pair(bar, rounds)) for bar in bars]
    suspects = sorted(range(len(bars)), key=lambda i: rows[i]['ratio'])[-4:]
    rows = [bars[i].make_row(*measure_pair(bars[i], 4 * rounds)) for i in suspects]
    return max(rows, key=lambda row: row['ratio'])
