# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What tools that measure have in common: options, where results come from, and how they are kept."""

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Union

import torch
from torch.multiprocessing import ProcessExitedException

import mmlinglo
from mmlinglo.utils.cli import UsageError

PACKAGES = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm')


def make_parser(
    description: Optional[str], name: str, rounds: Optional[int] = None, device: bool = True
) -> argparse.ArgumentParser:
    """Make a parser with the options that tools share.

    Args:
        description: What the tool does.
        name: Of the files that it writes, for ``--out``.
        rounds: Default of ``--rounds``; with it, the parser also has ``--threads``.
        device: Whether it then also has ``--device``.
    """
    parser = argparse.ArgumentParser(description=description)
    add, out = parser.add_argument, f'work_dirs/analysis/{name}'
    add('--out', default=out, help='path of the files, without suffix; default: %(default)s')
    if rounds is not None:
        text = 'rounds of timing; default: %(default)s'
        add('--rounds', type=at_least(2), default=rounds, help=text)
        text = "CPU threads; default: PyTorch's"
        add('--threads', type=at_least(1), default=torch.get_num_threads(), help=text)
    if rounds is not None and device:
        first = 'cuda' if torch.cuda.is_available() else 'cpu'
        add('--device', choices=['cpu', 'cuda'], default=first, help='default: %(default)s')
    return parser


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """Make the type of an option that is a number."""

    def number(text: str) -> Any:
        if not kind(text) >= least:
            raise argparse.ArgumentTypeError(f'must be at least {least}, got {text}')
        return kind(text)

    return number


@contextmanager
def explain_errors() -> Iterator[None]:
    """Explain to the user what a measurement raised for values that it cannot use."""
    try:
        yield
    except ProcessExitedException as error:
        raise UsageError(f'PyTorch crashed ({error}): leave models out by --models') from error
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error


def provenance(device: Union[str, torch.device], **more: Any) -> Dict[str, Any]:
    """Everything that a figure depends on besides the code's arguments.

    Args:
        device: Device of the measurement.
        more: Further entries, such as the batch size, and what is otherwise than in this process.

    Returns:
        Command, date, device, threads, data type, settings of glibc's malloc (environment variables),
        versions of the packages imported so far, and the git commit ('unknown' outside a checkout, with
        '-dirty' when tracked files are changed).
    """
    versions = {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
    source = dict(
        command=' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        dtype='float32',
        malloc={name: value for name, value in os.environ.items() if name.startswith('MALLOC_')},
        commit=git_commit(),
        versions=dict(python=platform.python_version(), mmlinglo=mmlinglo.__version__, **versions),
    )
    return {**source, **more}


def device_name(device: Union[str, torch.device]) -> str:
    """Model of a GPU, or of the CPU with the number of its cores."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.+)', info.read_text() if info.is_file() else '')
    return f'{(names or [platform.machine()])[0]}, {os.cpu_count()} cores'


def git_commit() -> str:
    """Commit of the checkout that this package is used from, or 'unknown'."""
    command = 'git describe --always --dirty --abbrev=12 --exclude=*'.split()
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return 'unknown'
    return done.stdout.strip() if done.returncode == 0 else 'unknown'


def list_rows(table: Any) -> List[dict]:
    """List the rows of a pandas.DataFrame, with None for NaN and infinity, which JSON does not have."""
    finite = table.replace([math.inf, -math.inf], math.nan).astype(object)
    return finite.where(finite.notna(), None).to_dict('records')


def write_report(out: Union[str, Path], rows: List[dict], source: Dict[str, Any]) -> None:
    """Write a table as ``<out>.json`` (with its provenance) and ``<out>.csv``.

    Args:
        out: Path without suffix; folders are made.
        rows: One dict a line; the CSV has all their keys as columns.
        source: From :func:`provenance`.

    Raises:
        UsageError: If a file cannot be written.
    """
    import pandas as pd

    text = json.dumps(dict(provenance=source, rows=rows), indent=2, allow_nan=False)
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(f'{out}.json').write_text(text + '\n')
        pd.DataFrame(rows, dtype=object).to_csv(f'{out}.csv', index=False)
    except OSError as error:
        raise UsageError(f'{str(out)!r} cannot be written: {error.strerror}') from error


def save_figure(figure: Any, out: Union[str, Path]) -> None:
    """Write a figure of matplotlib as ``<out>.png``; folders are made."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f'{out}.png', dpi=150)


def format_table(rows: List[dict], columns: Union[Sequence[str], Mapping[str, str]]) -> str:
    """Format a Markdown table.

    Args:
        rows: One dict a line; a missing key or None gives an empty cell, a float has four digits.
        columns: Key of each column, and its heading if that is another one.
    """

    def cell(value: Any) -> str:
        if value is None:
            return ''
        return f'{value:.4g}' if isinstance(value, float) else str(value)

    headings = list(columns.values()) if isinstance(columns, Mapping) else list(columns)
    body = [headings] + [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*body)]
    lines = [
        '| ' + ' | '.join(text.ljust(width) for text, width in zip(line, widths)) + ' |'
        for line in body
    ]
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(lines)
