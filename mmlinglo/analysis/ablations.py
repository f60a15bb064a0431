# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The paper's ablations (Sec. 5) as a campaign of short trainings: rows, orders, tables."""

import itertools
import math
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import pandas as pd
from matplotlib.figure import Figure
from mmengine.config import Config

from mmlinglo.analysis.curves import draw_curves
from mmlinglo.analysis.report import format_table, list_rows, save_figure, write_report
from mmlinglo.utils.deploy import build_model, switch_to_deploy


class Row(NamedTuple):
    """One model of the campaign."""

    source: str  # where in the paper
    variant: str
    paper_top1: Optional[float]  # ImageNet-1K after 100 epochs, in percent


# The most telling first: of an interrupted campaign they are what is there.
ROWS = {
    'linglo-b0': Row('Tables 5, 6; Figs. 4, 5', 'LinGlo-b0 (H-H-H-H, RP-CPE)', 69.7),
    'linglo-b0-cpe': Row('Table 6', 'CPE', 68.5),
    'linglo-b0-cchh': Row('Table 5', 'C-C-H-H', 67.2),
    'pvtv2-b0': Row('peer', 'PVTv2-B0', None),
    'resnet18': Row('peer', 'ResNet18', None),
    'linglo-b0-wo-c': Row('Fig. 5', 'LinGlo-w/o-C', None),
    'linglo-b0-wo-ch': Row('Fig. 5', 'LinGlo-w/o-CH', None),
    'linglo-b0-chhh': Row('Table 5', 'C-H-H-H', 68.8),
    'linglo-b0-p-cpe': Row('Table 6', 'P-CPE', 69.3),
    'linglo-b0-r-cpe': Row('Table 6', 'R-CPE', 69.2),
    'linglo-b0-dot-product': Row('Fig. 4', 'dot-product attention', None),
}
# Rows that belong together, by their names there; the best first where the paper ranks them.
RANKED = {
    'Table 5': {'linglo-b0': 'H-H-H-H', 'linglo-b0-chhh': 'C-H-H-H', 'linglo-b0-cchh': 'C-C-H-H'},
    'Table 6': {
        'linglo-b0': 'RP-CPE',
        'linglo-b0-p-cpe': 'P-CPE',
        'linglo-b0-r-cpe': 'R-CPE',
        'linglo-b0-cpe': 'CPE',
    },
    'Fig. 5': {'linglo-b0': 'LinGlo', 'linglo-b0-wo-c': 'w/o-C', 'linglo-b0-wo-ch': 'w/o-CH'},
}
PANELS = {
    **RANKED,
    'Dot-Product Attention (Fig. 4) and Peers': {
        'linglo-b0': 'LinGlo-b0',
        'linglo-b0-dot-product': 'dot-product attention',
        'pvtv2-b0': 'PVTv2-B0',
        'resnet18': 'ResNet18',
    },
}
# A whole order has the first of these that one of its pairs has.
VERDICTS = ('did not hold', 'missing', 'one seed: undecided', 'within noise', 'held')


def count_parameters(cfg: Config) -> Dict[str, float]:
    """Parameters of a config's model in millions, in its training form and deployed.

    Raises:
        ValueError: If the model cannot be built.
    """
    try:
        model = build_model(cfg).eval()
    except (TypeError, AssertionError, ImportError) as error:
        raise ValueError(f'the model cannot be built: {error}') from error
    training = sum(p.numel() for p in model.parameters())
    switch_to_deploy(model)
    deployed = sum(p.numel() for p in model.parameters())
    return dict(params_m=training / 1e6, deployed_params_m=deployed / 1e6)


def summarize(top1: pd.DataFrame, rows: List[str]) -> pd.DataFrame:
    """Mean and range over the seeds, for each row; not a number where no training is finished.

    Args:
        top1: Columns ``row`` and ``value``, one line for each finished training.
        rows: Those that were asked for.

    Returns:
        Columns ``seeds``, ``top1_mean``, ``top1_min``, ``top1_max``, by ``row``.
    """
    found = top1.groupby('row').value
    found = found.agg(seeds='size', top1_mean='mean', top1_min='min', top1_max='max')
    return found.reindex(rows).fillna(dict(seeds=0)).astype(dict(seeds=int)).rename_axis('row')


def order_rows(summary: pd.DataFrame) -> List[dict]:
    """Compare the paper's rankings with the results, as a whole and pair by pair.

    A pair held if the means differ as the paper says by more than the spread, which is the larger of both
    rows' ranges over their seeds; it did not hold if they differ by more than that the other way round;
    otherwise the difference is within noise. With one seed there is no spread, and the pair is undecided.

    Args:
        summary: From :func:`summarize`.

    Returns:
        One dict for each whole order and each of its pairs, with the differences in percentage points.
    """
    table: List[dict] = []
    for title, labels in RANKED.items():
        pairs = []
        for better, worse in itertools.combinations(labels, 2):
            found = summary.reindex([better, worse]).fillna(dict(seeds=0))
            difference = found.top1_mean[better] - found.top1_mean[worse]
            spread = (found.top1_max - found.top1_min).max() if found.seeds.min() > 1 else math.nan
            ours, theirs = (ROWS[name].paper_top1 or math.nan for name in (better, worse))
            reasons = {
                'missing': math.isnan(difference),
                'one seed: undecided': math.isnan(spread),
                'within noise': abs(difference) <= spread,
                'held': difference > 0,
                'did not hold': True,
            }
            verdict = next(reason for reason, holds in reasons.items() if holds)
            order, paper_difference = f'{labels[better]} > {labels[worse]}', round(ours - theirs, 2)
            pair = dict(paper=title, order=order, paper_difference=paper_difference)
            pairs.append(dict(pair, difference=difference, spread=spread, verdict=verdict))
        whole = min((pair['verdict'] for pair in pairs), key=VERDICTS.index)
        table += [dict(paper=title, order=' > '.join(labels.values()), verdict=whole), *pairs]
    return list_rows(pd.DataFrame(table))


def write_results(
    out: Path, runs: pd.DataFrame, params_m: Dict[str, dict], heading: str, source: dict
) -> str:
    """Write the table, the orders and the curves.

    Args:
        out: Path without suffix, of ``.json``, ``.csv``, ``.md`` and ``.png``, and with ``_orders`` appended
            of another ``.json`` and ``.csv``.
        runs: Finished trainings: columns ``row``, ``run``, ``step``, ``value``.
        params_m: What :func:`count_parameters` returned for each row that was asked for.
        heading: What was trained, in one line.
        source: From :func:`mmlinglo.analysis.report.provenance`.

    Returns:
        The text of the ``.md`` file.
    """
    last = runs.sort_values('step').groupby(['row', 'run'], as_index=False).last()
    summary = summarize(last, list(params_m))
    orders = order_rows(summary)
    table = []
    for name, found in zip(params_m, list_rows(summary)):
        paper, variant, paper_top1 = ROWS[name]
        row = dict(row=name, paper=paper, variant=variant, **params_m[name], **found)
        table.append(dict(row, paper_imagenet_top1=paper_top1))
    write_report(out, table, source)
    write_report(f'{out}_orders', orders, source)
    plot_campaign(runs, heading, out)
    columns = dict(paper='Paper', variant='Variant', params_m='Parameters, training (M)')
    columns.update(deployed_params_m='deployed (M)', seeds='Seeds', top1='Top-1 (%), mean (range)')
    columns.update(paper_imagenet_top1="Paper's, ImageNet, 100 epochs")
    order_columns = dict(paper='Paper', order='Order', verdict='Verdict')
    order_columns.update(difference='Difference of means', spread='Spread')
    order_columns.update(paper_difference="Paper's difference")
    for row in table:
        numbers = (row['top1_mean'], row['top1_min'], row['top1_max'])
        form = ('missing', '{:.2f}', '{:.2f} ({:.2f}-{:.2f})')[min(row['seeds'], 2)]
        row['top1'] = form.format(*numbers)
    for row in orders:
        for key, form in dict(difference='+.2f', paper_difference='+.2f', spread='.2f').items():
            row[key] = row[key] and format(row[key], form)
    parts = [
        f'# {heading}',
        'Top-1 accuracy on the test images after the last epoch.',
        format_table(table, columns),
        "The paper's orders. Differences in percentage points; held and did not hold mean a "
        'difference beyond the spread, the larger range of two rows over their seeds.',
        format_table(orders, order_columns),
        '{date}, {device}, commit {commit}: `{command}`'.format(**source),
    ]
    text = '\n\n'.join(parts)
    Path(f'{out}.md').write_text(f'{text}\n')
    return text


def plot_campaign(runs: pd.DataFrame, title: str, out: Path) -> None:
    """Draw the accuracy of each row against the epoch, mean and range over seeds, into ``<out>.png``.

    One panel for each comparison, with the rows that have a finished training.

    Args:
        runs: See :func:`write_results`.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    figure = Figure(figsize=(12, 8), layout='constrained')
    figure.suptitle(title)
    for axes, (panel, labels) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        axes.set_title(panel)
        curves = pd.concat(
            [runs[runs.row == row].assign(label=label) for row, label in labels.items()]
        )
        if len(curves):
            draw_curves(axes, curves, 'Epoch', 'Top-1 Accuracy (%)')
        else:
            axes.text(0.5, 0.5, 'No Finished Training', transform=axes.transAxes, ha='center')
    save_figure(figure, out)


PVTV2, CONVERTED = 'pvtv2-b0', 'linglo-b0_converted'
FURTHER, SCRATCH = 'linglo-b0_pvtv2-init', 'linglo-b0'


def write_starts(
    out: str, last: pd.DataFrame, epochs: Dict[str, int], seeds: List[str], source: dict
) -> str:
    """Write the table of starts from PVTv2 and from scratch; return it as Markdown.

    Args:
        out: Path without suffix, of ``.json``, ``.csv`` and ``.md``.
        last: Accuracies: columns ``row``, ``run``, ``value``.
        epochs: Of each row.
        seeds: Their runs.
        source: From :func:`mmlinglo.analysis.report.provenance`, with ``images`` and ``batch_size``.
    """
    by_seed = last.pivot(index='row', columns='run', values='value').reindex(columns=seeds)
    table = summarize(last, list(epochs)).join(by_seed)
    table.insert(0, 'epochs', list(epochs.values()))
    rows = list_rows(table.reset_index())
    write_report(out, rows, source)
    columns = dict(row='Model', epochs='Epochs', seeds='Seeds', top1_mean='Top-1 (%), mean')
    columns.update(top1_min='lowest', top1_max='highest', **{seed: seed for seed in seeds})
    gains = (table.loc[FURTHER, seeds] - table.loc[SCRATCH, seeds]).dropna().astype(float)
    text = '\n\n'.join(
        [
            '# CIFAR-10: {train} training and {test} test images'.format(**source['images']),
            f'Top-1 accuracy on the test images. {CONVERTED}: PVTv2-B0 of the same seed, converted, '
            f'not trained; {FURTHER}: trained further from there; {SCRATCH}: from scratch. Batches '
            f'of {source["batch_size"]}.',
            format_table(rows, columns),
            compare_starts(gains.tolist()),
            '{date}, {device}, commit {commit}: `{command}`'.format(**source),
        ]
    )
    Path(f'{out}.md').write_text(f'{text}\n')
    return text


def compare_starts(gains: List[float]) -> str:
    """What the seeds that have both say of starting from PVTv2."""
    if not gains:
        return 'No seed is finished.'
    mean, by_seed = sum(gains) / len(gains), ', '.join(f'{gain:+.2f}' for gain in gains)
    text = (
        f'From PVTv2 less from scratch, in percentage points: mean {mean:+.2f}, by seed {by_seed}.'
    )
    if len(gains) < 2:
        return f'{text} One seed decides nothing.'
    if min(gains) > 0:
        return f'{text} It helped with every seed.'
    return f'{text} It {"helped with some seeds only" if max(gains) > 0 else "did not help"}.'
