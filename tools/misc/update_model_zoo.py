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

from mmlinglo.analysis.complexity import Complexity, count_forms, image_shape, padded_shape
from mmlinglo.analysis.report import format_table
from mmlinglo.utils.cli import UsageError, load_config, run
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.files import complete_file

ROOT = Path(__file__).resolve().parents[2]
DATASETS = dict(imagenet='ImageNet-1k', coco='COCO', ade20k='ADE20K')
TASKS = dict(
    imagenet={'Image Classification': 'Top 1 Accuracy'},
    coco={'Object Detection': 'box AP', 'Instance Segmentation': 'mask AP'},
    ade20k={'Semantic Segmentation': 'mIoU'},
)
HEADER = """\
# Written by tools/misc/update_model_zoo.py; metrics, weights and the paper's claims are kept by hand.
# Metrics are null: these models have not been trained by this project yet.
# FLOPs are multiply-adds, as everywhere in OpenMMLab. They count the network as the paper writes it, not its rewritings.
"""
ZOO = ROOT / 'docs/model_zoo.md'
COLUMNS = dict(
    recipe='Recipe',
    metric='Metric',
    paper='Paper',
    ours='Ours',
    params='Parameters, training / deployed',
    macs='Multiply-adds, training / deployed',
    shape='Counted at',
)

_COUNTED: Dict[tuple, Dict[str, Complexity]] = {}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    text = 'write nothing; fail if a file would change'
    parser.add_argument('--check', action='store_true', help=text)
    return parser.parse_args(argv)


def counts(cfg: Config) -> Dict[str, object]:
    """Count the model of a config: the entries for its row in the metafile."""
    model = build_model(cfg).eval()
    shape = padded_shape(model, image_shape(cfg))
    backbone = {k: v for k, v in cfg.model.backbone.items() if k not in ('init_cfg', 'with_cp')}
    network = (str({**cfg.model, 'backbone': backbone}), shape)  # several recipes train the same
    if network not in _COUNTED:
        _COUNTED[network] = count_forms(model, shape)
    training, deployed = _COUNTED[network].values()
    return {
        'Parameters': training.params,
        'Deployed Parameters': deployed.params,
        'FLOPs': training.macs,
        'Deployed FLOPs': deployed.macs,
        'Counted at': f'{shape[0]} x {shape[1]}',
    }


def updated_row(path: Path, old: dict) -> dict:
    """Make the row of a config. It keeps all other entries of the old row."""
    task = path.parent.name
    cfg = load_config(str(path))
    masks = 'mask_head' in cfg.model.get('roi_head', {}) or 'panoptic_head' in cfg.model
    results = [
        dict(Task=name, Dataset=DATASETS[task], Metrics=None)
        for name in TASKS[task]
        if name != 'Instance Segmentation' or masks
    ]
    return {
        'Name': path.stem,
        'In Collection': 'LinGlo',
        'Config': path.relative_to(ROOT).as_posix(),
        'Results': results,
        **old,
        'Metadata': {**old.get('Metadata', {}), 'Training Data': DATASETS[task], **counts(cfg)},
    }


def table(task: str, rows: List[dict], document: Path) -> str:
    """Make the table of a task's rows. Its links are relative to the folder of ``document``."""
    lines = []
    for row in rows:
        entries = row['Metadata']
        metrics = {TASKS[task][each['Task']]: each['Metrics'] or {} for each in row['Results']}
        lines.append(
            dict(
                recipe=f'[{row["Name"]}]({os.path.relpath(ROOT / row["Config"], document.parent)})',
                metric=' / '.join(metrics),
                paper=_join([entries.get(f'{metric} in the Paper') for metric in metrics], '-'),
                ours=_join([v.get(k) for k, v in metrics.items()], 'not yet trained here'),
                params=f'{_join_forms(entries, "Parameters", 1e6)} M',
                macs=f'{_join_forms(entries, "FLOPs", 1e9)} G',
                shape=entries['Counted at'],
            )
        )
    return format_table(lines, COLUMNS)


def list_configs(folder: Path) -> str:
    """Make a table of the configs in a folder, with the first line of each docstring."""
    lines = []
    for path in sorted(folder.glob('*.py')):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ''
        summary = docstring.partition('\n')[0].replace('`', '')
        lines.append(dict(config=f'[{path.stem}]({path.name})', summary=summary))
    return format_table(lines, dict(config='Config', summary='What it is'))


def _join(values: List[Optional[float]], none: str) -> str:
    return none if None in values else ' / '.join(f'{value:.1f}' for value in values)


def _join_forms(entries: dict, key: str, unit: float) -> str:
    return ' / '.join(f'{entries[form + key] / unit:.2f}' for form in ('', 'Deployed '))


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


def changed_files() -> Dict[Path, str]:
    """Find the files that are not up to date, and their new texts."""
    texts, rows = {}, {}
    for task in DATASETS:
        path = ROOT / 'configs' / task / 'metafile.yml'
        content = yaml.safe_load(path.read_text())
        old = {row['Name']: row for row in content.get('Models') or []}
        configs = sorted(path.parent.glob('*.py'))
        rows[task] = [updated_row(config, old.get(config.stem, {})) for config in configs]
        content['Models'] = rows[task]
        texts[path] = HEADER + yaml.safe_dump(content, sort_keys=False, width=100)
    texts.update(updated_documents(rows))
    return {path: text for path, text in texts.items() if path.read_text() != text}


def updated_documents(rows: Dict[str, List[dict]]) -> Dict[Path, str]:
    """Make the new texts of all documents with tables, from the rows of each task's metafile."""
    texts = {ZOO: with_tables(ZOO, {task: table(task, rows[task], ZOO) for task in DATASETS})}
    for path in sorted((ROOT / 'configs').glob('[!_]*/README.md')):
        name = path.parent.name
        content = table(name, rows[name], path) if name in rows else list_configs(path.parent)
        texts[path] = with_tables(path, {name: content})
    return texts


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    changed = changed_files()
    names = ', '.join(path.relative_to(ROOT).as_posix() for path in changed)
    if args.check and changed:
        raise UsageError(f'not up to date: {names}. Run python {Path(sys.argv[0]).as_posix()}')
    for path, text in changed.items():
        with complete_file(path) as file:
            file.write_text(text)
    print(f'written: {names}' if changed else 'everything is up to date')
    return 0


if __name__ == '__main__':
    run(main)
