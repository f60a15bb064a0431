# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Latency, memory and size of backbones against each other, at one size of images and over many."""

import math
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from mmlinglo.analysis.complexity import count_complexity
from mmlinglo.analysis.memory import (
    OutOfMemoryError,
    ProcessDiedError,
    call_in_fresh_process,
    peak_memory_mib,
)
from mmlinglo.analysis.peers import ALL, build_backbone

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
Step = Callable[[], object]


class Variant(NamedTuple):
    """What is measured of a backbone.

    Attributes:
        model: A key of :data:`~mmlinglo.analysis.peers.ALL`.
        fused: Whether it is the form for inference rather than the trained one.
        compiled: Whether it is compiled by ``torch.compile``.
    """

    model: str
    fused: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Setting:
    """How backbones are executed.

    Args:
        batch_size: Images in a batch.
        device: Device of the measurement.
        dtype: Data type of weights and images.
        threads: CPU threads; None for PyTorch's default.
        train_step: Whether to measure forward and backward of the training form.
        shape: Height and width of the images in pixels.
        maps: Whether the backbones return four feature maps rather than pooled features.
        autocast: Whether the forward is under autocast to bfloat16.
        channels_last: Whether images and kernels are channels-last in memory.

    Raises:
        ValueError: If a number is out of range, there is no GPU, or autocast is not of float32.
    """

    batch_size: int = 1
    device: str = 'cpu'
    dtype: torch.dtype = torch.float32
    threads: Optional[int] = None
    train_step: bool = False
    shape: Tuple[int, int] = (224, 224)
    maps: bool = False
    autocast: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name, value in (('batch size', self.batch_size), ('threads', self.threads)):
            if value is not None and value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if torch.device(self.device).type == 'cuda' and not torch.cuda.is_available():
            raise ValueError(f'device {self.device!r}: PyTorch finds no GPU here, use a CPU')
        # In training, a last map of one position is too little for batch norms.
        least = 2 * DIVISOR if self.train_step else DIVISOR
        if min(self.shape) < least:
            raise ValueError(
                f'images must be at least {least} pixels high and wide, got {self.shape}'
            )
        if self.autocast and self.dtype != torch.float32:
            raise ValueError(f'autocast is of float32 weights, got {self.dtype}')

    def prepare_process(self) -> None:
        """Set the number of threads and start them; their stacks are not the model's memory."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.zeros(2**24).add_(1)  # long enough for all of them


def padded(shape: Sequence[int]) -> Tuple[int, int]:
    """Height and width padded as for detection, such as 800 x 1333 to 800 x 1344."""
    height, width = (math.ceil(length / DIVISOR) * DIVISOR for length in shape)
    return height, width


def variants_of(
    models: Sequence[str], forms: Sequence[str] = FORMS, compiled: bool = False
) -> List[Variant]:
    """Variants to measure; a backbone without a fused form is in both forms what was trained.

    Args:
        models: Keys of :data:`~mmlinglo.analysis.peers.ALL`.
        forms: Of :data:`FORMS`.
        compiled: Whether to compile each beside its eager execution.

    Raises:
        ValueError: If a model is unknown.
    """
    unknown = [name for name in models if name not in ALL]
    if unknown:
        raise ValueError(f'no model {", ".join(unknown)}; there are {", ".join(ALL)}')
    found = []
    for model in models:
        for form in forms:
            fused = form == 'fused' and ALL[model].fused
            found += [Variant(model, fused, engine) for engine in (False, True)[: 1 + compiled]]
    return list(dict.fromkeys(found))


def build_step(variant: Variant, setting: Setting) -> Step:
    """Build a backbone and random images, and return the step on both.

    Raises:
        ValueError: If a fused form is to be trained.
    """
    if setting.train_step and variant.fused:
        raise ValueError(f'{variant.model!r}: the fused form is not for training')
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = build_backbone(variant.model, setting.shape, setting.maps, variant.fused)
    model.to(setting.device, setting.dtype, memory_format=layout).train(setting.train_step)
    images = torch.randn(setting.batch_size, 3, *setting.shape).to(setting.device, setting.dtype)
    images = images.contiguous(memory_format=layout)
    if variant.compiled:
        model = torch.compile(model)
    return make_step(model, images, setting.train_step, setting.autocast)


def make_step(model: nn.Module, images: Tensor, train_step: bool, autocast: bool = False) -> Step:
    """One forward in inference mode, or a forward and backward of the sum of all outputs.

    Args:
        model: In the mode that belongs to the step.
        images: (B, 3, H, W).
        train_step: Whether to go backward too.
        autocast: Whether the forward is under autocast to bfloat16.
    """

    def forward() -> Any:
        device = images.device.type
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            return model(images)

    def train() -> None:
        model.zero_grad()
        outputs = forward()
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        sum(output.float().sum() for output in outputs).backward()

    return train if train_step else torch.inference_mode()(forward)


def time_steps(
    steps: Dict[Any, Step], rounds: int, warmup: int = 3, min_seconds: float = 0.02
) -> Dict[Any, List[float]]:
    """Time steps in interleaved rounds, so that what disturbs the machine disturbs all alike.

    Each round calls every step once (a short one repeatedly, until about ``min_seconds`` have passed).
    The clock is torch's, which waits for a GPU.

    Args:
        steps: What to time.
        rounds: Rounds that count, at least 2.
        warmup: Calls before, at least 1, which do not count.
        min_seconds: Shortest time that is taken, in seconds.

    Returns:
        Lower quartile, median and upper quartile in milliseconds a call.

    Raises:
        ValueError: If there are fewer than 2 rounds.
    """
    if rounds < 2:
        raise ValueError(f'rounds must be at least 2, got {rounds}')

    def seconds(step: Step, repeats: int) -> float:
        start = timer()
        for _ in range(repeats):
            step()
        return (timer() - start) / repeats

    last = {name: [seconds(step, 1) for _ in range(warmup)][-1] for name, step in steps.items()}
    repeats = {name: max(1, round(min_seconds / time)) for name, time in last.items()}
    times: Dict[Any, List[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(1e3 * seconds(step, repeats[name]))
    return {name: statistics.quantiles(x, n=4, method='inclusive') for name, x in times.items()}


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
    :func:`~mmlinglo.analysis.memory.peak_memory_mib`. Those that fit are then timed together, in
    interleaved rounds, in one further process.

    Args:
        variants: See :func:`variants_of`.
        setting: See :class:`Setting`.
        rounds: Rounds of timing, at least 2.
        memory: Whether to measure memory, a few seconds each; never of compiled ones, as it is the compiler's.
        limit_gib: Memory in GiB that one may take; None for what there is.
        max_seconds: Time that the first call, by which memory is measured, may take; None for no limit.

    Returns:
        A row a variant, with the units in the names; ``status`` is ``'ok'``, ``'out of memory'``, ``'too
        slow'``, or ``'crashed'`` as PyTorch does in some operators. None where not measured.

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
    without = [v.model for v in variants if setting.maps and not ALL[v.model].has_maps]
    if without:
        raise ValueError(f'{", ".join(without)}: no four feature maps, measure at 224 x 224 only')
    status: Dict[Variant, str] = {}
    profiles: Dict[Variant, Tuple[float, float]] = {}
    for variant in variants:
        # What does not fit eagerly is not tried compiled.
        status[variant] = status.get(variant._replace(compiled=False), 'ok')
        if not memory or variant.compiled:
            continue
        try:
            limited = limit_gib is not None
            found = call_in_fresh_process(_profile, variant, setting, limit_gib, limited=limited)
        except (OutOfMemoryError, ProcessDiedError) as error:
            died = isinstance(error, ProcessDiedError)
            status[variant] = 'crashed' if died else 'out of memory'
        else:
            profiles[variant] = found
            if max_seconds is not None and found[1] > max_seconds:
                status[variant] = 'too slow'
    fitting = [variant for variant in variants if status[variant] == 'ok']
    try:
        timings = call_in_fresh_process(_timings, fitting, setting, rounds) if fitting else {}
    except OutOfMemoryError:
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
    max_seconds: Optional[float] = 20.0,
) -> Iterator[dict]:
    """Measure backbones at growing sizes, each until it is too slow or out of memory.

    Args:
        models: Keys of :data:`~mmlinglo.analysis.peers.ALL`; in their fused form, in training as they are.
        sizes: Heights and widths of the images in pixels.
        setting: See :class:`Setting`; its shape is without effect.
        rounds: See :func:`measure_backbones`, also for the next two, and what is raised.
        limit_gib: Memory in GiB that one may take.
        max_seconds: Time in seconds that a first call may take.

    Yields:
        Rows of :func:`measure_backbones`, size by size; none for sizes that a backbone did not get to.
    """
    left = variants_of(models, ('trained' if setting.train_step else 'fused',))
    settings = [replace(setting, shape=(size, size)) for size in sorted(set(sizes))]
    for at_size in settings:
        rows = measure_backbones(left, at_size, rounds, True, limit_gib, max_seconds)
        left = [variant for variant, row in zip(left, rows) if row['status'] == 'ok']
        yield from rows


def add_ratios(rows: List[dict], reference: str) -> None:
    """Add ``latency_ratio`` to rows: their latency over that of ``reference``, or None.

    The reference is taken at the same size, in the same engine and, if it was measured, in its form for
    inference.
    """
    conditions = ('engine', 'height', 'width')
    latencies = {}
    for row in sorted(rows, key=lambda row: FORMS.index(row['form'])):
        if row['model'] == reference:
            latencies[tuple(map(row.get, conditions))] = row['latency_ms']
    for row in rows:
        theirs = latencies.get(tuple(map(row.get, conditions)))
        row['latency_ratio'] = row['latency_ms'] and theirs and row['latency_ms'] / theirs


def _profile(variant: Variant, setting: Setting, limit_gib: Optional[float]) -> Tuple[float, float]:
    """Peak memory in MiB of a model's first step, and its time in seconds."""
    setting.prepare_process()
    build_step(variant, replace(setting, shape=SMALL))()
    seconds = []

    def build() -> Step:
        step = build_step(variant, setting)

        def timed() -> None:
            start = timer()
            step()
            seconds.append(timer() - start)

        return timed

    return peak_memory_mib(build, setting.device, limit_gib), seconds[0]


def _timings(
    variants: Sequence[Variant], setting: Setting, rounds: int
) -> Dict[Variant, List[float]]:
    setting.prepare_process()
    return time_steps({variant: build_step(variant, setting) for variant in variants}, rounds)


def _row(
    variant: Variant,
    setting: Setting,
    status: str,
    timing: Optional[List[float]],
    profile: Optional[Tuple[float, float]],
) -> dict:
    lower, median, upper = timing or (None, None, None)
    peak, first_call = profile or (None, None)
    model = build_backbone(variant.model, setting.shape, setting.maps, variant.fused)
    macs = not_counted = None
    try:
        macs = count_complexity(model, torch.empty(1, 3, *setting.shape)).macs / 1e9
    except ValueError as error:  # an operator without a rule, in some version of a peer
        not_counted = str(error)
    height, width = setting.shape
    engine = 'compiled' if variant.compiled else 'eager'
    row = dict(model=variant.model, form=FORMS[variant.fused], engine=engine)
    row.update(height=height, width=width, batch_size=setting.batch_size, status=status)
    row.update(latency_ms=median, latency_lower_ms=lower, latency_upper_ms=upper)
    row.update(images_per_s=median and 1e3 * setting.batch_size / median)
    row.update(peak_memory_mib=peak, first_call_s=first_call)
    params_m = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    row.update(params_m=params_m, macs_g=macs, not_counted=not_counted)
    peer = ALL[variant.model]
    return dict(row, top1=peer.top1, top1_source=peer.source, distilled=peer.distilled)
