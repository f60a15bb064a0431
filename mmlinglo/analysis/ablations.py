# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The paper's ablations (Sec. 5) as a campaign of short trainings: its rows, their settings, their results.

A campaign's folder holds, for each training, its settings ``<row>/seed<k>.py``
beside its work dir ``<row>/seed<k>/``.
"""

import fcntl
import itertools
import os
import signal
import statistics
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope

from mmlinglo.analysis.curves import Run, draw_curves, read_scalars
from mmlinglo.analysis.report import format_table, with_suffix, write_report
from mmlinglo.utils.deploy import build_model, switch_to_deploy

METRIC = 'accuracy/top1'
Runs = Dict[str, List[Run]]  # finished trainings of each row, one for each seed


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


class Comparison(NamedTuple):
    """Rows that belong together, by their names there; the best first where the paper ranks them."""

    title: str
    labels: Dict[str, str]
    ranked: bool


COMPARISONS = (
    Comparison(
        'Table 5',
        {'linglo-b0': 'H-H-H-H', 'linglo-b0-chhh': 'C-H-H-H', 'linglo-b0-cchh': 'C-C-H-H'},
        ranked=True,
    ),
    Comparison(
        'Table 6',
        {
            'linglo-b0': 'RP-CPE',
            'linglo-b0-p-cpe': 'P-CPE',
            'linglo-b0-r-cpe': 'R-CPE',
            'linglo-b0-cpe': 'CPE',
        },
        ranked=True,
    ),
    Comparison(
        'Fig. 5',
        {'linglo-b0': 'LinGlo', 'linglo-b0-wo-c': 'w/o-C', 'linglo-b0-wo-ch': 'w/o-CH'},
        ranked=True,
    ),
    Comparison(
        'Dot-product attention (Fig. 4) and peers',
        {
            'linglo-b0': 'LinGlo-b0',
            'linglo-b0-dot-product': 'dot-product attention',
            'pvtv2-b0': 'PVTv2-B0',
            'resnet18': 'ResNet18',
        },
        ranked=False,
    ),
)

# A whole order has the first of these that one of its pairs has.
VERDICTS = ('did not hold', 'missing', 'one seed: undecided', 'within noise', 'held')


@DATASETS.register_module()
def class_balanced_subset(dataset: dict, fraction: float) -> BaseDataset:
    """Build a data set of the first samples of each class, the same ones at every call.

    Args:
        dataset: Config of one of mmpretrain's data sets.
        fraction: Share of each class, in (0, 1]; rounded to samples, at least 1.

    Raises:
        ValueError: If ``fraction`` is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f'the fraction of a data set must be in (0, 1], got {fraction}')
    full = DATASETS.build(dataset)
    members: Dict[int, List[int]] = {}
    for index, label in enumerate(full.get_gt_labels()):
        members.setdefault(int(label), []).append(index)
    kept = [indices[: max(1, round(fraction * len(indices)))] for indices in members.values()]
    return full.get_subset(sorted(itertools.chain.from_iterable(kept)))


def set_training(
    cfg: Config,
    seed: int,
    epochs: Optional[int] = None,
    data_root: Optional[str] = None,
    fraction: float = 1.0,
    test_fraction: float = 1.0,
) -> None:
    """Set what the trainings of a campaign may differ in from their configs, in place.

    Args:
        cfg: Config of one of the rows, of ``configs/cifar10``.
        seed: Of everything that is drawn at random.
        epochs: At least 2, of which the first is for warming up; None for the
            config's own.
        data_root: Folder of the data; None for the config's own.
        fraction: Share of each class of the training set, in (0, 1].
        test_fraction: The same of the test set.

    Raises:
        ValueError: If there are fewer than 2 epochs.
    """
    cfg.randomness = dict(seed=seed)
    if epochs is not None:
        cfg.train_cfg.max_epochs = epochs
    if cfg.train_cfg.max_epochs < 2:
        raise ValueError(
            f'epochs must be at least 2, of which the first is for warming up, '
            f'got {cfg.train_cfg.max_epochs}'
        )
    for loader, share in (
        (cfg.train_dataloader, fraction),
        (cfg.val_dataloader, test_fraction),
        (cfg.test_dataloader, test_fraction),
    ):
        if data_root is not None:
            loader.dataset.data_root = data_root
        if share != 1:
            loader.dataset = dict(
                type=class_balanced_subset.__name__, dataset=loader.dataset, fraction=share
            )
            cfg.custom_imports = dict(imports=[__name__], allow_failed_imports=False)


def count_images(cfg: Config) -> Dict[str, int]:
    """Images of the training set, ``train``, and of the test set, ``test``.

    CIFAR-10's pickles are downloaded if they are missing.

    Raises:
        ValueError: If the data cannot be read, or are too few for the batch.
    """
    init_default_scope(cfg.default_scope)
    loaders = dict(train=cfg.train_dataloader, test=cfg.val_dataloader)
    try:
        images = {name: len(DATASETS.build(loader.dataset)) for name, loader in loaders.items()}
    except Exception as error:  # each data set, and the download, has its own kinds
        raise ValueError(
            f'the data cannot be read ({type(error).__name__}: {error}): give their folder, with '
            "CIFAR-10's pickles or, in the folder format, pictures in {train,test}/<class>/"
        ) from error
    batch_size = cfg.train_dataloader.batch_size
    if images['train'] < 2 * batch_size:  # the warm-up needs two steps
        raise ValueError(
            f'{images["train"]} training images are less than two batches of {batch_size}: take '
            'a larger fraction, or a smaller train_dataloader.batch_size'
        )
    return images


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


@contextmanager
def lock(path: Path) -> Iterator[Optional[int]]:
    """Take a training, so that no other campaign does.

    Yields:
        File descriptor of the locked file; a process that inherits it keeps the
        file locked as long as it lives. None if another process has locked it.
    """
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def keep_settings(cfg: Config, path: Path) -> None:
    """Write a training's settings, or make sure that those written are the same.

    Args:
        cfg: Config of the training.
        path: The file, with the suffix ``.py``.

    Raises:
        ValueError: If the file has other settings, or is missing beside a work dir.
    """
    if path.exists():
        before, now = (
            _flatten(config.to_dict())
            for config in (Config.fromfile(path), Config.fromstring(cfg.pretty_text, '.py'))
        )
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            more = f' (and {len(changed) - 1} more)' if len(changed) > 1 else ''
            raise ValueError(
                f'{str(path)!r} was made with other settings: {key} {before.get(key)!r} instead of '
                f'{now.get(key)!r}{more}. Ask for the same ones, or name another folder'
            )
        return
    if path.with_suffix('').exists():
        raise ValueError(
            f'{str(path.with_suffix(""))!r} is there without its settings, {path.name}: name '
            'another folder'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f'.{os.getpid()}')
    part.write_text(cfg.pretty_text)
    part.replace(path)


def train(program: Path, settings: Path, locked: int) -> bool:
    """Start a training, or go on with it from its last validated epoch, and wait for its end.

    Its output goes to ``train.log`` in its work dir; of its checkpoints the last
    one remains. When this process is interrupted, so is the training. When it is
    killed, the training goes on, and remains locked.

    Args:
        program: ``tools/train.py``.
        settings: The file of :func:`keep_settings`.
        locked: File descriptor from :func:`lock`.

    Returns:
        Whether it ended well.
    """
    work_dir = settings.with_suffix('')
    work_dir.mkdir(exist_ok=True)
    command = [sys.executable, str(program), str(settings), '--work-dir', str(work_dir)]
    checkpoint = checkpoint_to_resume(work_dir)
    if checkpoint is not None:
        command += ['--resume', str(checkpoint)]
    with open(work_dir / 'train.log', 'a') as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[locked],
            start_new_session=True,
        )
        try:
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of its data loaders
            process.wait()
            raise
    if not is_finished(settings):
        return False
    last = checkpoint_to_resume(work_dir)
    for other in work_dir.glob('epoch_*.pth'):
        if other != last:
            other.unlink()
    return True


def read_run(work_dir: Path) -> Run:
    """Top-1 accuracy in percent after each validated epoch; empty if there is none yet.

    Raises:
        ValueError: If a log is damaged.
    """
    logs = work_dir.glob('*/vis_data/scalars.json')
    if not any(METRIC in log.read_text() for log in logs):
        return []
    return read_scalars(work_dir, METRIC)


def checkpoint_to_resume(work_dir: Path) -> Optional[Path]:
    """Checkpoint of the last epoch that was also validated, or None.

    A later one may be incomplete, and going on from it would leave its epoch
    without a point on the curve.
    """
    for epoch, _ in reversed(read_run(work_dir)):
        path = work_dir / f'epoch_{int(epoch)}.pth'
        if path.is_file():
            return path
    return None


def is_finished(settings: Path) -> bool:
    """Whether checkpoint and accuracy of a training's last epoch are there."""
    if not settings.exists():
        return False
    last = f'epoch_{Config.fromfile(settings).train_cfg.max_epochs}.pth'
    checkpoint = checkpoint_to_resume(settings.with_suffix(''))
    return checkpoint is not None and checkpoint.name == last


def result_rows(runs: Runs, params_m: Dict[str, Dict[str, float]]) -> List[dict]:
    """The campaign's table.

    Args:
        runs: Finished trainings of each row that was asked for.
        params_m: What :func:`count_parameters` returned for each row.

    Returns:
        One dict for each row: the top-1 accuracy in percent after the last
        epoch, as mean and range over the seeds (None where no training is
        finished), and the paper's.
    """
    table = []
    for name, finished in runs.items():
        row, top1 = ROWS[name], [run[-1][1] for run in finished]
        table.append(
            dict(
                row=name,
                paper=row.source,
                variant=row.variant,
                **params_m[name],
                seeds=len(top1),
                top1_mean=statistics.fmean(top1) if top1 else None,
                top1_min=min(top1, default=None),
                top1_max=max(top1, default=None),
                paper_imagenet_top1=row.paper_top1,
            )
        )
    return table


def order_rows(runs: Runs) -> List[dict]:
    """Compare the paper's rankings with the results, as a whole and pair by pair.

    A pair held if the means differ as the paper says by more than the spread,
    which is the larger of both rows' ranges over their seeds; it did not hold if
    they differ by more than that the other way round; otherwise the difference is
    within noise. With one seed there is no spread, and the pair is undecided. A
    whole order held if all of its pairs did, and did not hold if one of them did not.

    Args:
        runs: Finished trainings of each row.

    Returns:
        One dict for each whole order and each of its pairs, with the
        differences in percentage points.
    """
    table = []
    for title, labels, ranked in COMPARISONS:
        if not ranked:
            continue
        pairs = []
        for better, worse in itertools.combinations(labels, 2):
            paper = [ROWS[name].paper_top1 for name in (better, worse)]
            pairs.append(
                dict(
                    paper=title,
                    order=f'{labels[better]} > {labels[worse]}',
                    paper_difference=None if None in paper else round(paper[0] - paper[1], 2),
                    **_compare(*([run[-1][1] for run in runs.get(n, [])] for n in (better, worse))),
                )
            )
        whole = min((pair['verdict'] for pair in pairs), key=VERDICTS.index)
        order = ' > '.join(labels.values())
        table += [dict(paper=title, order=order, verdict=whole), *pairs]
    return table


def write_results(
    out: Path, runs: Runs, params_m: Dict[str, Dict[str, float]], heading: str, source: dict
) -> str:
    """Write the table, the orders and the curves.

    Args:
        out: Path without suffix, of ``.json``, ``.csv``, ``.md`` and ``.png``, and
            with ``_orders`` appended of another ``.json`` and ``.csv``.
        runs: Finished trainings of each row that was asked for.
        params_m: What :func:`count_parameters` returned for each row.
        heading: What was trained, in one line.
        source: From :func:`mmlinglo.analysis.report.provenance`.

    Returns:
        The text of the ``.md`` file.
    """
    table, orders = result_rows(runs, params_m), order_rows(runs)
    write_report(out, table, source)
    write_report(with_suffix(out, '_orders'), orders, source)
    plot_campaign(runs, heading, out)
    shown = [dict(row, top1=_mean_and_range(row)) for row in table]
    columns = dict(
        paper='Paper',
        variant='Variant',
        params_m='Parameters, training (M)',
        deployed_params_m='deployed (M)',
        seeds='Seeds',
        top1='Top-1 (%), mean (range)',
        paper_imagenet_top1="Paper's, ImageNet, 100 epochs",
    )
    order_columns = dict(
        paper='Paper',
        order='Order',
        verdict='Verdict',
        difference='Difference of means',
        spread='Spread',
        paper_difference="Paper's difference",
    )
    text = '\n\n'.join(
        [
            f'# {heading}',
            'Top-1 accuracy on the test images after the last epoch.',
            format_table(shown, columns),
            "The paper's orders. Differences in percentage points; held and did not hold mean a "
            'difference beyond the spread, the larger range of two rows over their seeds.',
            format_table([_rounded(row) for row in orders], order_columns),
            f'{source["date"]}, {source["device"]}, commit {source["commit"]}: '
            f'`{source["command"]}`',
        ]
    )
    with_suffix(out, '.md').write_text(text + '\n')
    return text


def plot_campaign(runs: Runs, title: str, out: Path) -> None:
    """Draw the accuracy of each row against the epoch, mean and range over seeds, into ``<out>.png``.

    One panel for each comparison, with the rows that have a finished training.

    Args:
        runs: Finished trainings of each row.
        title: Title of the figure.
        out: Path without suffix; folders are made.
    """
    figure = Figure(figsize=(12, 8), layout='constrained')
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, comparison in zip(panels.flat, COMPARISONS):
        axes.set_title(comparison.title)
        curves = {label: runs[name] for name, label in comparison.labels.items() if runs.get(name)}
        if curves:
            draw_curves(axes, curves, 'epoch', 'top-1 (%)')
        else:
            axes.text(0.5, 0.5, 'no finished training', transform=axes.transAxes, ha='center')
    out = with_suffix(out, '.png')
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _compare(better: List[float], worse: List[float]) -> dict:
    if not better or not worse:
        return dict(difference=None, spread=None, verdict='missing')
    difference = statistics.fmean(better) - statistics.fmean(worse)
    if min(len(better), len(worse)) < 2:
        return dict(difference=difference, spread=None, verdict='one seed: undecided')
    spread = max(max(values) - min(values) for values in (better, worse))
    if abs(difference) <= spread:
        verdict = 'within noise'
    else:
        verdict = 'held' if difference > 0 else 'did not hold'
    return dict(difference=difference, spread=spread, verdict=verdict)


def _mean_and_range(row: dict) -> str:
    if not row['seeds']:
        return 'missing'
    mean = f'{row["top1_mean"]:.2f}'
    low, high = row['top1_min'], row['top1_max']
    return mean if row['seeds'] == 1 else f'{mean} ({low:.2f}-{high:.2f})'


def _rounded(row: dict) -> dict:
    shown = {
        key: f'{value:+.2f}' if isinstance(value, float) else value for key, value in row.items()
    }
    return dict(shown, spread=str(shown.get('spread') or '').lstrip('+'))


def _flatten(config: dict, prefix: str = '') -> Dict[str, Any]:
    """Settings by their dotted names, as ``--cfg-options`` names them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f'{prefix}{key}.'))
        else:
            flat[f'{prefix}{key}'] = value
    return flat
