# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Bring the metafiles, docs/model_zoo.md and the README of each config folder up to date with the configs.

Every config in configs/imagenet, configs/coco and configs/ade20k gets a row with its parameters and
multiply-adds, which mmlinglo.analysis.complexity counts. The tool keeps all other entries of the
metafiles: the paper's claims, metrics, weights. The tables of the other folders quote the configs'
docstrings.
"""

import argparse
import ast
import os
import re
import sys
from pathlib import Path
from typing import Dict, List, Optional

import yaml
from mmengine.config import Config

from mmlinglo.analysis.complexity import count_forms, image_shape, padded_shape
from mmlinglo.analysis.report import format_table
from mmlinglo.utils.cli import UsageError, load_config, run
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.files import complete_file

ROOT = Path(__file__).resolve().parents[2]
# Folder in configs/: the data set, and the metric of each task.
TASKS = dict(
    imagenet=('ImageNet-1k', {'Image Classification': 'Top 1 Accuracy'}),
    coco=('COCO', {'Object Detection': 'box AP', 'Instance Segmentation': 'mask AP'}),
    ade20k=('ADE20K', {'Semantic Segmentation': 'mIoU'}),
)
ZOO = ROOT / 'docs/model_zoo.md'


def counts(cfg: Config) -> Dict[str, object]:
    """Count the model of a config: the entries for its row in the metafile."""
    model = build_model(cfg).eval()
    shape = padded_shape(model, image_shape(cfg))
    training, deployed = count_forms(model, shape).values()
    return {
        'Parameters': training.params,
        'Deployed Parameters': deployed.params,
        'FLOPs': training.macs,
        'Deployed FLOPs': deployed.macs,
        'Counted at': f'{shape[0]} x {shape[1]}',
    }


def updated_row(path: Path, old: dict) -> dict:
    """Make the row of a config. It keeps all other entries of the old row."""
    dataset, metrics = TASKS[path.parent.name]
    cfg = load_config(str(path))
    masks = 'mask_head' in cfg.model.get('roi_head', {}) or 'panoptic_head' in cfg.model
    tasks = [task for task in metrics if masks or task != 'Instance Segmentation']
    results = [dict(Task=task, Dataset=dataset, Metrics=None) for task in tasks]
    return {
        'Name': path.stem,
        'In Collection': 'LinGlo',
        'Config': path.relative_to(ROOT).as_posix(),
        'Results': results,
        **old,
        'Metadata': {**old.get('Metadata', {}), 'Training Data': dataset, **counts(cfg)},
    }


def table(folder: str, rows: List[dict], document: Path) -> str:
    """Make the table of the rows of a metafile. Its links are relative to the folder of ``document``."""
    lines = []
    for row in rows:
        entries = row['Metadata']
        metrics = {TASKS[folder][1][x['Task']]: x['Metrics'] or {} for x in row['Results']}
        paper = [entries.get(f'{metric} in the Paper') for metric in metrics]
        ours = [given.get(metric) for metric, given in metrics.items()]
        params = [entries[key] / 1e6 for key in ('Parameters', 'Deployed Parameters')]
        macs = [entries[key] / 1e9 for key in ('FLOPs', 'Deployed FLOPs')]
        line = {
            'Recipe': f'[{row["Name"]}]({os.path.relpath(ROOT / row["Config"], document.parent)})',
            'Metric': ' / '.join(metrics),
            'Paper': '-' if None in paper else ' / '.join(map('{:.1f}'.format, paper)),
            'Ours': 'not yet trained here'
            if None in ours
            else ' / '.join(map('{:.1f}'.format, ours)),
            'Parameters, training / deployed': '{:.2f} / {:.2f} M'.format(*params),
            'Multiply-adds, training / deployed': '{:.2f} / {:.2f} G'.format(*macs),
            'Counted at': entries['Counted at'],
        }
        lines.append(line)
    return format_table(lines, list(lines[0]))


def list_configs(folder: Path) -> str:
    """Make a table of the configs in a folder, with the first line of each docstring."""
    lines = []
    for path in sorted(folder.glob('*.py')):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ''
        summary = docstring.partition('\n')[0].replace('`', '')
        lines.append({'Config': f'[{path.stem}]({path.name})', 'What it is': summary})
    return format_table(lines, list(lines[0]))


def with_tables(document: Path, tables: Dict[str, str]) -> str:
    """Text of a document with new tables between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    text = document.read_text()
    for name, content in tables.items():
        marked = re.compile(rf'(<!-- table: {name} -->\n).*?<!-- end -->', re.DOTALL)
        text, number = marked.subn(lambda match, c=content: f'{match[1]}{c}\n<!-- end -->', text)
        if number != 1:
            where = document.relative_to(ROOT).as_posix()
            raise UsageError(
                f'{where} must have one line "<!-- table: {name} -->" and a line "<!-- end -->" below'
            )
    return text


def updated_documents(rows: Dict[str, List[dict]]) -> Dict[Path, str]:
    """Make the new texts of all documents with tables, from the rows of each metafile."""
    texts = {ZOO: with_tables(ZOO, {name: table(name, rows[name], ZOO) for name in rows})}
    for path in sorted((ROOT / 'configs').glob('[!_]*/README.md')):
        name = path.parent.name
        content = table(name, rows[name], path) if name in rows else list_configs(path.parent)
        texts[path] = with_tables(path, {name: content})
    return texts


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    text = 'write nothing; fail if a file would change'
    parser.add_argument('--check', action='store_true', help=text)
    check = parser.parse_args(argv).check
    texts, rows = {}, {}
    for folder in TASKS:
        path = ROOT / 'configs' / folder / 'metafile.yml'
        text = path.read_text()
        comment, content = re.match('(#.*\n)*', text)[0], yaml.safe_load(text)
        old = {row['Name']: row for row in content.get('Models') or []}
        configs = sorted(path.parent.glob('*.py'))
        rows[folder] = [updated_row(config, old.get(config.stem, {})) for config in configs]
        content['Models'] = rows[folder]
        texts[path] = comment + yaml.safe_dump(content, sort_keys=False, width=100)
    texts.update(updated_documents(rows))
    changed = {path: text for path, text in texts.items() if path.read_text() != text}
    names = ', '.join(path.relative_to(ROOT).as_posix() for path in changed)
    if check and changed:
        raise UsageError(f'not up to date: {names}. Run python {Path(sys.argv[0]).as_posix()}')
    for path, text in changed.items():
        with complete_file(path) as file:
            file.write_text(text)
    print(f'written: {names}' if changed else 'everything is up to date')
    return 0


if __name__ == '__main__':
    run(main)
