# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Latency, memory and size of backbones against each other, at one size of images and over many."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor, nn

from mmlinglo.analysis.backbones import BACKBONES, build_backbone
from mmlinglo.analysis.complexity import count_complexity
from mmlinglo.analysis.execution import Execution, result_or_out_of_memory
from mmlinglo.analysis.memory import ProcessDiedError, peak_memory_mib
from mmlinglo.analysis.timing import Timing, measure, synchronize

FORMS = ('trained', 'fused')
DIVISOR = 32  # to whose multiple the toolboxes' data preprocessors pad images for detection
SMALL = (64, 64)  # images whose step loads the libraries before another's memory is measured
COLUMNS = dict(
    model='Model',
    form='Form',
    engine='Engine',
    width='Width',
    latency_ms='Latency [ms]',
    latency_lower_ms='lower quartile',
    latency_upper_ms='upper quartile',
    latency_ratio='Ratio',
    images_per_s='Images/s',
    peak_memory_mib='Peak memory [MiB]',
    params_m='Params [M]',
    macs_g='MACs [G]',
    top1='Published top-1',
    status='Status',
)
"""Columns of a printed table, and their headings."""


class Variant(NamedTuple):
    """What is measured of a backbone.

    Attributes:
        model: A key of :data:`~mmlinglo.analysis.backbones.BACKBONES`.
        fused: Whether it is the form for inference rather than the trained one.
        compiled: Whether it is compiled by ``torch.compile``.
    """

    model: str
    fused: bool = False
    compiled: bool = False


class Profile(NamedTuple):
    """Peak memory of a model's first step, and its time."""

    peak_memory_mib: float
    first_call_s: float


@dataclass(frozen=True)
class Setting(Execution):
    """What the backbones of a comparison have in common, besides their execution.

    Args:
        shape: Height and width of the images in pixels.
        maps: Whether the backbones return four feature maps rather than pooled
            features.
        autocast: Whether the forward is under autocast to bfloat16.
        channels_last: Whether images and kernels are channels-last in memory.

    Raises:
        ValueError: If a size is below 32 pixels or autocast is not of float32.
    """

    shape: Tuple[int, int] = (224, 224)
    maps: bool = False
    autocast: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.shape) < DIVISOR:
            raise ValueError(
                f'images must be at least {DIVISOR} pixels high and wide, got {self.shape}'
            )
        if self.autocast and self.dtype != torch.float32:
            raise ValueError(f'autocast is of float32 weights, got {self.dtype}')

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of images and kernels in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def padded(shape: Sequence[int]) -> Tuple[int, int]:
    """Height and width padded as for detection, such as 800 x 1333 to 800 x 1344."""
    height, width = (math.ceil(length / DIVISOR) * DIVISOR for length in shape)
    return height, width


def variants_of(
    models: Sequence[str], forms: Sequence[str] = FORMS, compiled: bool = False
) -> List[Variant]:
    """Variants to measure; a backbone without a fused form is in both forms what was trained.

    Args:
        models: Keys of :data:`~mmlinglo.analysis.backbones.BACKBONES`.
        forms: Of :data:`FORMS`.
        compiled: Whether to compile each beside its eager execution.

    Raises:
        ValueError: If a model or form is unknown.
    """
    for what, names, known in (('model', models, BACKBONES), ('form', forms, FORMS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f'no {what} {", ".join(unknown)}; there are {", ".join(known)}')
    found = []
    for model in models:
        for form in forms:
            fused = form == 'fused' and BACKBONES[model].fusion is not None
            found += [Variant(model, fused, engine) for engine in (False, True)[: 1 + compiled]]
    return list(dict.fromkeys(found))


def build_step(variant: Variant, setting: Setting) -> Callable[[], object]:
    """Build a backbone and images, and return the step on both.

    Raises:
        ValueError: If a fused form is to be trained.
    """
    if setting.train_step and variant.fused:
        raise ValueError(f'{variant.model!r}: the fused form is not for training')
    model = build_backbone(variant.model, setting.shape, setting.maps, variant.fused)
    model.to(setting.device, setting.dtype, memory_format=setting.memory_format)
    model.train(setting.train_step)
    images = random_images(setting)
    if variant.compiled:
        model = torch.compile(model)
    return make_step(model, images, setting.train_step, setting.autocast)


def make_step(
    model: nn.Module, images: Tensor, train_step: bool, autocast: bool = False
) -> Callable[[], object]:
    """One forward in inference mode, or a forward and backward of the sum of all outputs.

    Args:
        model: In the mode that belongs to the step.
        images: (B, 3, H, W).
        train_step: Whether to go backward too.
        autocast: Whether the forward is under autocast to bfloat16.
    """

    def precision() -> ContextManager:
        if not autocast:
            return nullcontext()
        return torch.autocast(images.device.type, dtype=torch.bfloat16)

    def infer() -> object:
        with torch.inference_mode(), precision():
            return model(images)

    def train() -> None:
        model.zero_grad()
        with precision():
            outputs = model(images)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        sum(output.float().sum() for output in outputs).backward()

    return train if train_step else infer


def random_images(setting: Setting) -> Tensor:
    """Images of a setting, (B, 3, H, W)."""
    shape = (setting.batch_size, 3, *setting.shape)
    images = torch.randn(shape, device=setting.device, dtype=setting.dtype)
    return images.contiguous(memory_format=setting.memory_format)


def measure_backbones(
    variants: Sequence[Variant],
    setting: Setting,
    rounds: int = 10,
    memory: bool = True,
    limit_gib: Optional[float] = None,
    max_seconds: Optional[float] = None,
) -> List[dict]:
    """Measure backbones at one size of images.

    The memory of each is measured in a process of its own, see
    :func:`~mmlinglo.analysis.memory.peak_memory_mib`. Those that fit are then timed
    together, in interleaved rounds, in one further process.

    Args:
        variants: See :func:`variants_of`.
        setting: See :class:`Setting`.
        rounds: Rounds of timing, at least 2.
        memory: Whether to measure memory, which takes a few seconds a backbone.
            That of a compiled one is not, since it is mostly the compiler's.
        limit_gib: Memory in GiB that one may take; None for what there is.
        max_seconds: Time in seconds that the first call may take, by which memory
            is measured; None for no limit.

    Returns:
        One row a variant: ``model``, ``form``, ``engine`` (``'eager'`` or
        ``'compiled'``), ``height``, ``width``, ``batch_size``, ``status`` (``'ok'``,
        ``'out of memory'``, ``'too slow'``, or ``'crashed'`` as PyTorch does in some
        operators), ``latency_ms`` a batch (median) with its quartiles
        ``latency_lower_ms`` and ``latency_upper_ms``, ``images_per_s``,
        ``peak_memory_mib``, ``first_call_s``; ``params_m`` in 10^6 and ``macs_g`` an
        image in 10^9 (None, with the reason in ``not_counted``, if they cannot be);
        ``top1``, ``top1_source``, ``distilled`` and ``fusion`` of
        :class:`~mmlinglo.analysis.backbones.Backbone`. None where not measured.

    Raises:
        ValueError: If an argument is out of range.
        ProcessDiedError: If PyTorch crashes while the backbones are timed together.
        RuntimeError: If a measurement fails for another reason than memory.
    """
    if rounds < 2:
        raise ValueError(f'rounds must be at least 2, got {rounds}')
    for name, value in (('memory limit', limit_gib), ('maximum of seconds', max_seconds)):
        if value is not None and not value > 0:
            raise ValueError(f'the {name} must be above 0, got {value}')
    if not memory and not (limit_gib is None and max_seconds is None):
        raise ValueError('limits of memory and time need the measurement of memory')
    profiles: Dict[Variant, Optional[Profile]] = {}
    status: Dict[Variant, str] = {}
    for variant in variants:
        # What does not fit eagerly is not tried compiled.
        status[variant] = status.get(variant._replace(compiled=False), 'ok')
        if memory and not variant.compiled:
            try:
                profiles[variant] = result_or_out_of_memory(
                    _profile, variant, setting, limit_gib, limited=limit_gib is not None
                )
            except ProcessDiedError:
                status[variant] = 'crashed'
                continue
            if profiles[variant] is None:
                status[variant] = 'out of memory'
            elif max_seconds is not None and profiles[variant].first_call_s > max_seconds:
                status[variant] = 'too slow'
    fitting = [variant for variant in variants if status[variant] == 'ok']
    timings = result_or_out_of_memory(_timings, fitting, setting, rounds) if fitting else {}
    if timings is None:
        timings = {}
        status.update(dict.fromkeys(fitting, 'out of memory'))
    return [
        _row(variant, setting, status[variant], timings.get(variant), profiles.get(variant))
        for variant in variants
    ]


def sweep(
    models: Sequence[str],
    sizes: Sequence[int],
    setting: Setting,
    rounds: int = 5,
    limit_gib: Optional[float] = None,
    max_seconds: float = 20.0,
) -> Iterator[dict]:
    """Measure backbones at growing sizes, each until it is too slow or out of memory.

    Args:
        models: Keys of :data:`~mmlinglo.analysis.backbones.BACKBONES`; taken in
            their fused form, in training as they are.
        sizes: Heights and widths of the images in pixels.
        setting: See :class:`Setting`; its shape is without effect.
        rounds: See :func:`measure_backbones`, as are the next two.
        limit_gib: Memory in GiB that one may take.
        max_seconds: Time in seconds that a first call may take.

    Yields:
        Rows of :func:`measure_backbones`, size by size; none for sizes that a
        backbone did not get to.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If a measurement fails for another reason than memory.
    """
    left = variants_of(models, ('trained' if setting.train_step else 'fused',))
    for size in sorted(set(sizes)):
        at_size = replace(setting, shape=(size, size))
        rows = measure_backbones(left, at_size, rounds, True, limit_gib, max_seconds)
        left = [variant for variant, row in zip(left, rows) if row['status'] == 'ok']
        yield from rows


def add_ratios(rows: List[dict], reference: str) -> None:
    """Add ``latency_ratio`` to rows: their latency over that of ``reference``.

    The reference is taken at the same size, in the same engine and, if it was measured,
    in its form for inference. Rows without a latency, or whose reference has none, get None.

    Raises:
        ValueError: If there is no row of the reference.
    """
    if reference not in {row['model'] for row in rows}:
        models = list(dict.fromkeys(row['model'] for row in rows))
        raise ValueError(f'no reference {reference!r} among the models {", ".join(models)}')

    def conditions(row: dict) -> Tuple[str, int, int]:
        return row['engine'], row['height'], row['width']

    latencies = {}
    for row in sorted(rows, key=lambda row: FORMS.index(row['form'])):
        if row['model'] == reference:
            latencies[conditions(row)] = row['latency_ms']
    for row in rows:
        both = (row['latency_ms'], latencies.get(conditions(row)))
        row['latency_ratio'] = None if None in both else both[0] / both[1]


def _profile(variant: Variant, setting: Setting, limit_gib: Optional[float]) -> Profile:
    setting.prepare_process()
    build_step(variant, replace(setting, shape=SMALL))()
    seconds = []

    def build() -> Callable[[], object]:
        step = build_step(variant, setting)

        def timed() -> None:
            start = time.perf_counter()
            step()
            synchronize(torch.device(setting.device))
            seconds.append(time.perf_counter() - start)

        return timed

    peak = peak_memory_mib(build, setting.device, limit_gib)
    return Profile(peak, seconds[0])


def _timings(variants: Sequence[Variant], setting: Setting, rounds: int) -> Dict[Variant, Timing]:
    setting.prepare_process()
    steps = {variant: build_step(variant, setting) for variant in variants}
    return measure(steps, setting.device, rounds)


def _row(
    variant: Variant,
    setting: Setting,
    status: str,
    timing: Optional[Timing],
    profile: Optional[Profile],
) -> dict:
    backbone = BACKBONES[variant.model]
    median, lower, upper = (None,) * 3 if timing is None else (1e3 * value for value in timing)
    return dict(
        model=variant.model,
        form=FORMS[variant.fused],
        engine='compiled' if variant.compiled else 'eager',
        height=setting.shape[0],
        width=setting.shape[1],
        batch_size=setting.batch_size,
        status=status,
        latency_ms=median,
        latency_lower_ms=lower,
        latency_upper_ms=upper,
        images_per_s=None if timing is None else setting.batch_size / timing.median,
        peak_memory_mib=None if profile is None else profile.peak_memory_mib,
        first_call_s=None if profile is None else profile.first_call_s,
        **_count(variant, setting),
        top1=backbone.top1,
        top1_source=backbone.source,
        distilled=backbone.distilled,
        fusion=backbone.fusion,
    )


def _count(variant: Variant, setting: Setting) -> Dict[str, Any]:
    model = build_backbone(variant.model, setting.shape, setting.maps, variant.fused)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found: Dict[str, Any] = dict(params_m=parameters / 1e6, macs_g=None, not_counted=None)
    try:
        # The whole batch, on which LinGlo's order of products depends.
        images = torch.empty(setting.batch_size, 3, *setting.shape)
        found['macs_g'] = count_complexity(model, images).macs / 1e9 / setting.batch_size
    except ValueError as error:  # an operator without a rule, in some version of a peer
        found['not_counted'] = str(error)
    return found
