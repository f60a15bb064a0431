# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Results of measurements: where they come from, and how they are kept."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Union

import torch

import mmlinglo

PACKAGES = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm')


def provenance(
    device: Union[str, torch.device], dtype: torch.dtype = torch.float32, **more: Any
) -> Dict[str, Any]:
    """Everything that a figure depends on besides the code's arguments.

    Args:
        device: Device of the measurement.
        dtype: Data type of the measurement.
        more: Further entries, such as the batch size.

    Returns:
        Command, date, device, threads, data type, settings of glibc's malloc (environment variables),
        versions of the packages imported so far, and the git commit ('unknown' outside a checkout, with
        '-dirty' when tracked files are changed).
    """
    versions = {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
    return dict(
        command=' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix('torch.'),
        malloc={name: value for name, value in os.environ.items() if name.startswith('MALLOC_')},
        commit=git_commit(),
        versions=dict(python=platform.python_version(), mmlinglo=mmlinglo.__version__, **versions),
        **more,
    )


def device_name(device: Union[str, torch.device]) -> str:
    """Model of a GPU, or of the CPU with the number of its cores."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    model = names[0] if names else platform.processor() or platform.machine()
    return f'{model}, {os.cpu_count()} cores'


def git_commit() -> str:
    """Commit of the checkout that this package is used from, or 'unknown'."""
    command = 'git describe --always --dirty --abbrev=12 --exclude=*'.split()
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return 'unknown'
    return done.stdout.strip() if done.returncode == 0 else 'unknown'


def write_report(out: Union[str, Path], rows: List[dict], source: Dict[str, Any]) -> None:
    """Write a table as ``<out>.json`` (with its provenance) and ``<out>.csv``.

    Args:
        out: Path without suffix; folders are made.
        rows: One dict a line; the CSV has all their keys as columns.
        source: From :func:`provenance`.
    """
    import pandas as pd

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(provenance=source, rows=rows), indent=2, allow_nan=False)
    with_suffix(out, '.json').write_text(text + '\n')
    pd.DataFrame(rows, dtype=object).to_csv(with_suffix(out, '.csv'), index=False)


def save_figure(figure: Any, out: Union[str, Path]) -> None:
    """Write a figure of matplotlib as ``<out>.png``; folders are made."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(with_suffix(out, '.png'), dpi=150)


def with_suffix(out: Union[str, Path], suffix: str) -> Path:
    """``out`` with ``suffix`` appended; dots in its name stay (unlike Path.with_suffix)."""
    return Path(f'{out}{suffix}')


def format_table(rows: List[dict], columns: Dict[str, str]) -> str:
    """A Markdown table.

    Args:
        rows: One dict a line; a missing key or None gives an empty cell, a float has four digits.
        columns: Key of each column and its heading.
    """

    def cell(value: Any) -> str:
        if value is None:
            return ''
        return f'{value:.4g}' if isinstance(value, float) else str(value)

    body = [list(columns.values())] + [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*body)]
    lines = [
        '| ' + ' | '.join(text.ljust(width) for text, width in zip(line, widths)) + ' |'
        for line in body
    ]
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(lines)
