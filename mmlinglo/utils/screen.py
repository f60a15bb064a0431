# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Keep the screen short: log files hold everything, standard output only what you need while you wait."""

import re
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from typing import Any, Iterator, TextIO

# A record as mmengine's logger writes it, perhaps with a coloured level.
RECORD = re.compile(
    r'\d\d/\d\d (\d\d:\d\d:\d\d) - \S+ - \S*?(DEBUG|INFO|WARNING|ERROR)\S* - (.*)', re.DOTALL
)
# Progress messages of the toolboxes and pycocotools, and warnings without a reason.
NOISE = re.compile(
    r'Could not import OneDL|Failed to search registry|'
    r'Loading and preparing results|DONE \(t=|Done \(t=|Converting ndarray to lists|'
    r'Running per image evaluation|Evaluate annotation type|Accumulating evaluation results|'
    r'loading annotations into memory|creating index|index created|'
    r'The prefix is not set in metric class|'
    r'will be deprecated in future|will be deprecated\. Please|^Exp name: |Evaluating \w+\.\.\.|'
    r'_copypaste: '
)
WARNINGS = (
    'faster_coco_eval is not installed',  # an alternative to what is used
    '.*bbox is out of bounds',
    '.*pin_memory',
    '.*meshgrid',
    'Setting (MKL|OMP)_NUM_THREADS',
    'Grad strides do not match bucket view strides',  # a copy of a small kernel
)


class Screen:
    """Standard output without the messages that only a log file needs.

    It shows warnings, errors, one line per logging interval, metrics, messages of mmlinglo, and everything
    that is printed outside of a log, except :data:`NOISE`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.dropped = False

    def write(self, text: str) -> int:
        """Write or drop a text. A log record arrives as one text; a print arrives as two, itself and its end."""
        if text == '\n' and self.dropped:
            self.dropped = False
            return 1
        found = RECORD.match(text)
        if found:
            clock, level, message = found.groups()
            shown = _is_shown(level, message, _get_caller())
            text = f'{clock} {"" if level == "INFO" else f"{level}: "}{message}'
        else:
            shown = not NOISE.search(text)
        self.dropped = not shown and not text.endswith('\n')
        if shown:
            self.stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _is_shown(level: str, message: str, caller: str) -> bool:
    if NOISE.search(message):
        return False
    if level != 'INFO':
        return caller != 'mmlinglo.utils.cli'  # it shows its error after the log has it
    if caller in ('mmengine.hooks.logger_hook', 'mmlinglo.engine.hooks'):
        # a progress bar shows how far an evaluation is
        return not (re.match(r'(Epoch|Iter)\((val|test)\)', message) and 'eta:' in message)
    if '.evaluation.' in caller:
        return '\n' in message  # the tables
    if caller == 'mmengine.hooks.checkpoint_hook':
        return 'best checkpoint' in message
    return caller.startswith('mmlinglo.')


def _get_caller() -> str:
    """Find the module that wrote the current log record."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        name = frame.f_globals.get('__name__', '')
        if not name.startswith(('logging', 'mmengine.logging', __name__)):
            return name
        frame = frame.f_back
    return ''


@contextmanager
def quiet_screen() -> Iterator[None]:
    """Show less on standard output, and hide warnings that users of a tool do not need."""
    with warnings.catch_warnings(), redirect_stdout(Screen(sys.stdout)):  # type: ignore[type-var]
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter('ignore', category)
        for message in WARNINGS:
            warnings.filterwarnings('ignore', message=message)
        yield
