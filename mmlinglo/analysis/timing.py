# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Timing of several functions against each other in one process."""

import statistics
import time
from typing import Callable, Dict, NamedTuple, Union

import torch


class Timing(NamedTuple):
    """Seconds a call: the median of the rounds and their quartiles."""

    median: float
    lower: float
    upper: float


def measure(
    functions: Dict[str, Callable[[], object]],
    device: Union[str, torch.device] = 'cpu',
    rounds: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.02,
) -> Dict[str, Timing]:
    """Time functions in interleaved rounds, so that what disturbs the machine disturbs all alike.

    Each round calls every function once (a short one repeatedly, until about
    ``min_seconds`` have passed). The device is synchronized before the clock is
    read.

    Args:
        functions: What to time, without arguments.
        device: Where the work is done.
        rounds: Rounds that count, at least 2.
        warmup: Rounds before, which do not count.
        min_seconds: Shortest time that is taken, in seconds.
    """
    device = torch.device(device)

    def seconds(function: Callable[[], object], repeats: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize(device)
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, function in functions.items():
        for _ in range(warmup):
            once = seconds(function, 1)
        repeats[name] = max(1, round(min_seconds / once)) if warmup else 1
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, repeats[name]))
    result = {}
    for name, values in times.items():
        lower, median, upper = statistics.quantiles(values, n=4, method='inclusive')
        result[name] = Timing(median, lower, upper)
    return result


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, if it has one."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
