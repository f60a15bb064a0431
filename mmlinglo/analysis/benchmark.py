# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Latency, memory and size of backbones against each other, at one size of images and over many."""

import statistics
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from torch.utils.benchmark import timer

from mmlinglo.analysis.complexity import count_complexity
from mmlinglo.analysis.memory import OutOfMemoryError, call_in_fresh_process, measure_first_step
from mmlinglo.analysis.peers import STAGES, build_backbone, find_peer

FORMS = ('trained', 'fused')
DTYPES = ('float32', 'float16', 'bfloat16', 'autocast')
STRIDE = 32  # of the last map
SMALL = (64, 64)  # images whose step loads the libraries before another's memory is measured
TIMES = ('latency_lower_ms', 'latency_ms', 'latency_upper_ms', 'images_per_s')
FIRST_STEP = ('peak_memory_mib', 'first_call_s')
COLUMNS = (
    *('model', 'form', 'engine', 'width', 'latency_ms', 'latency_lower_ms', 'latency_upper_ms'),
    *('latency_ratio', 'images_per_s', 'peak_memory_mib', 'params_m', 'macs_g', 'top1', 'status'),
)
"""Of a printed table."""
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """A backbone and how it is executed.

    Raises:
        ValueError: If a value is out of range or does not fit the backbone, or there is no GPU.
    """

    model: str  # a key of mmlinglo.analysis.peers.ALL
    fused: bool = False  # the form for inference rather than the trained one
    compiled: bool = False  # by torch.compile
    batch_size: int = 1
    shape: Tuple[int, int] = (224, 224)  # height and width of the images in pixels
    maps: bool = False  # it returns four feature maps rather than pooled features
    train_step: bool = False  # forward and backward of the trained form
    device: str = 'cpu'
    dtype: str = 'float32'  # of DTYPES; autocast is of float32, to bfloat16

    def __post_init__(self) -> None:
        find_peer(self.model, self.maps, self.fused)
        if self.train_step and self.fused:
            raise ValueError(f'{self.model!r}: the fused form is not for training')
        if self.batch_size < 1:
            raise ValueError(f'batch size must be at least 1, got {self.batch_size}')
        if torch.device(self.device).type == 'cuda' and not torch.cuda.is_available():
            raise ValueError(f'device {self.device!r}: PyTorch finds no GPU here, use a CPU')
        # In training, a last map of one position is too little for batch norms.
        least = 2 * STRIDE if self.train_step else STRIDE
        if min(self.shape) < least:
            raise ValueError(
                f'images must be at least {least} pixels high and wide, got {self.shape}'
            )

    def __str__(self) -> str:
        return 'B {}, {} x {}'.format(self.batch_size, *self.shape)

    def build(self) -> Tuple[nn.Module, Tensor]:
        """Build the backbone, in the mode that belongs to the step, and random images, where they are needed."""
        dtype = torch.float32 if self.dtype == 'autocast' else getattr(torch, self.dtype)
        stages = STAGES if self.maps else ()
        model = build_backbone(self.model, self.shape, stages, self.fused).train(self.train_step)
        images = torch.randn(self.batch_size, 3, *self.shape)
        return model.to(self.device, dtype), images.to(self.device, dtype)

    def build_step(self) -> Step:
        """Build the step on both."""
        model, images = self.build()
        run = torch.compile(model) if self.compiled else model
        return make_step(run, images, train_step=self.train_step, autocast=self.dtype == 'autocast')


def list_settings(
    models: Sequence[str], forms: Sequence[str] = FORMS, compiled: bool = False, **common: Any
) -> List[Setting]:
    """List what to measure; a backbone without a fused form is in both forms what was trained.

    Args:
        models: Keys of :data:`~mmlinglo.analysis.peers.ALL`.
        forms: Of :data:`FORMS`.
        compiled: Whether to compile each beside its eager execution.
        common: What all have in common, see :class:`Setting`, also for what is raised.
    """
    found = [
        Setting(model, form == 'fused' and find_peer(model).fused, engine, **common)
        for model, form, engine in product(models, forms, (False, True)[: 1 + compiled])
    ]
    return list(dict.fromkeys(found))


def make_step(model: Any, *inputs: Any, train_step: bool, autocast: bool = False) -> Step:
    """Make one forward in inference mode, or a forward and backward of the sum of all outputs.

    Args:
        model: In the mode that belongs to the step.
        inputs: Of the model, a tensor first.
        train_step: Whether to go backward too.
        autocast: Whether the forward is under autocast to bfloat16.
    """
    x: Tensor = inputs[0]

    def forward() -> Any:
        with torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext():
            return model(*inputs)

    def train() -> None:
        model.zero_grad()
        x.grad = None
        outputs = forward()
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

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


def time_settings(settings: Sequence[Any], rounds: int) -> Dict[Any, List[float]]:
    """Time the steps of :class:`Setting` or the like, see :func:`time_steps`."""
    return time_steps({setting: setting.build_step() for setting in settings}, rounds)


def profile(small: Any, setting: Any) -> Tuple[float, float]:
    """Measure the first step of a :class:`Setting` or the like, after that of a small one.

    See :func:`~mmlinglo.analysis.memory.measure_first_step`.
    """
    small.build_step()()
    return measure_first_step(setting.build_step, getattr(setting, 'device', 'cpu'))


def measure_backbones(
    settings: Sequence[Setting],
    shapes: Sequence[Tuple[int, int]],
    rounds: int = 10,
    memory: bool = True,
    max_seconds: Optional[float] = None,
) -> Iterator[dict]:
    """Measure backbones at growing sizes, each until it is too slow, crashes or is out of memory.

    The memory of each is measured in a process of its own, see
    :func:`~mmlinglo.analysis.memory.measure_first_step`. Those that fit are then timed together, in
    interleaved rounds, in one further process.

    Args:
        settings: See :func:`list_settings`; their shape is without effect.
        shapes: Heights and widths of the images in pixels.
        rounds: Rounds of timing, at least 2.
        memory: Whether to measure memory, a few seconds each; never of compiled ones, as it is the compiler's.
        max_seconds: Time that the first call, by which memory is measured, may take; None for no limit.

    Yields:
        Size by size a row a setting, with the units in the names; ``status`` is ``'ok'``, ``'out of memory'``,
        ``'too slow'``, or ``'crashed'`` as PyTorch does in some operators. None where not measured.

    Raises:
        torch.multiprocessing.ProcessExitedException: If PyTorch crashes while the backbones are timed.
        torch.multiprocessing.ProcessRaisedException: If a measurement fails for another reason than memory.
    """
    for shape in sorted(set(shapes)):
        rows = {each: describe(each) for each in (replace(s, shape=shape) for s in settings)}
        if memory:
            _measure_memory(rows, max_seconds)
        _measure_latency(rows, rounds)
        settings = [setting for setting, row in rows.items() if row['status'] == 'ok']
        yield from rows.values()


def _measure_memory(rows: Dict[Setting, dict], max_seconds: Optional[float]) -> None:
    for setting, row in rows.items():
        # What does not fit eagerly is not tried compiled.
        row['status'] = rows.get(replace(setting, compiled=False), row)['status']
        if setting.compiled:
            continue
        try:
            found = call_in_fresh_process(profile, replace(setting, shape=SMALL), setting)
        except OutOfMemoryError:
            row['status'] = 'out of memory'
        except ProcessExitedException:
            row['status'] = 'crashed'
        else:
            row.update(zip(FIRST_STEP, found))
            if max_seconds is not None and row['first_call_s'] > max_seconds:
                row['status'] = 'too slow'


def _measure_latency(rows: Dict[Setting, dict], rounds: int) -> None:
    fitting = [setting for setting, row in rows.items() if row['status'] == 'ok']
    if not fitting:
        return
    try:
        times = call_in_fresh_process(time_settings, fitting, rounds)
    except OutOfMemoryError:
        for setting in fitting:
            rows[setting]['status'] = 'out of memory'
        return
    for setting, quartiles in times.items():
        speed = 1e3 * setting.batch_size / quartiles[1]
        rows[setting].update(zip(TIMES, (*quartiles, speed)))


def describe(setting: Setting) -> Dict[str, Any]:
    """Make a row of what is known without a measurement, with None for what is measured."""
    how: Dict[str, Any] = dict(batch_size=1, train_step=False, device='cpu', dtype='float32')
    (model, image), peer = replace(setting, **how).build(), find_peer(setting.model)
    macs = not_counted = None
    try:
        macs = count_complexity(model, image).macs / 1e9
    except ValueError as error:  # an operator without a rule, in some version of a peer
        not_counted = str(error)
    height, width = setting.shape
    engine = 'compiled' if setting.compiled else 'eager'
    row: Dict[str, Any] = dict(model=setting.model, form=FORMS[setting.fused], engine=engine)
    row.update(height=height, width=width, batch_size=setting.batch_size, status='ok')
    row.update(dict.fromkeys((*TIMES, *FIRST_STEP)))
    params = sum(parameter.numel() for parameter in model.parameters())
    row.update(params_m=params / 1e6, macs_g=macs, not_counted=not_counted)
    return dict(row, top1=peer.top1, top1_source=peer.source, distilled=peer.distilled)


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
