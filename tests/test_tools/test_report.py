# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The page about a training, of real trainings and of logs that say what a test needs."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import import_tool, run_tool
from trainings import TASKS, logged, write_tiny_config

from mmlinglo.analysis import page
from mmlinglo.utils.cli import UsageError

ODD = '<b>&'
METRICS = dict(
    detection=('coco/bbox_mAP', 'Box AP, mean over overlaps (IoU) from 0.50 to 0.95', '.3f'),
    segmentation=('mIoU', 'Overlap (IoU), mean of the classes (%)', '.2f'),
    classification=('accuracy/top1', 'Accuracy (%)', '.2f'),
)
TABLES = dict(
    detection='AP of the classes',
    segmentation='Overlap (IoU) of the classes',
    classification='Confusion matrix',
)


class Page(HTMLParser):
    """Headings, notes, sources of images and rows of tables; each tag must be closed in its turn."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text()
        self.open, self.sources, self.rows, self.headings, self.notes = [], [], [], [], []
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not {'href', 'srcset', 'onload'} & attributes.keys()
        assert tag not in ('link', 'script', 'iframe')
        if tag == 'img':
            assert attributes['alt']
            self.sources.append(attributes['src'])
        elif tag != 'meta':
            self.open.append(tag)
        kinds = dict(tr=self.rows, h1=self.headings, h2=self.headings, p=self.notes)
        if tag in kinds:
            kinds[tag].append([] if tag == 'tr' else '')
        if tag in ('td', 'th'):
            self.rows[-1].append('')

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open:
            return
        if self.open[-1] in ('td', 'th'):
            self.rows[-1][-1] += data
        elif self.open[-1] in ('h1', 'h2'):
            self.headings[-1] += data
        elif self.open[-1] == 'p':
            self.notes[-1] += data

    def row(self, first):
        (found,) = (row for row in self.rows if row[0] == first)
        return found[1:]


def report(work_dir, *options):
    args = [str(work_dir), '--device', 'cpu', *map(str, options)]
    assert import_tool('tools/analysis_tools/report.py').main(args) == 0
    found = Page(work_dir / 'report.html')
    assert all(source.startswith('data:image/') for source in found.sources)
    assert 'url(' not in found.text
    return found


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Work dirs of a training of each task, with a validation after each half of it."""
    root = tmp_path_factory.mktemp('report')
    numbers = '--num-train 16 --num-val 8 --num-demo 1 --size 64'.split()
    assert import_tool('tools/misc/make_shapes.py').main([str(root / 'shapes'), *numbers]) == 0
    for split in ('train', 'val'):
        folder = root / 'shapes' / 'imagenet' / split
        (folder / 'disc').rename(folder / ODD)
    for task in TASKS:
        folder = root / task
        folder.mkdir()
        interval = 2 if task == 'segmentation' else 1
        extra = f'train_cfg = dict(val_interval={interval})\n'
        extra += 'default_hooks = dict(logger=dict(interval=1))'
        config = write_tiny_config(folder, root / 'shapes', task, extra)
        run_tool('tools/train.py', config, '--work-dir', folder / 'work')
    return root


@pytest.mark.parametrize('task', TASKS)
def test_page_of_a_training(task, trained, capsys):
    work_dir = trained / task / 'work'
    found = report(work_dir, '--num', 3, '--score-thr', 0)
    assert capsys.readouterr().out.splitlines()[-1] == str(work_dir / 'report.html')
    assert found.headings == [
        'config',
        'Curves',
        'Metrics on the validation data',
        'Ground truth and predictions',
        TABLES[task],
        'How it was made',
    ]
    key, name, digits = METRICS[task]
    values = [(line[key], line['step']) for line in logged(work_dir) if key in line]
    assert len(values) == 2
    unit = 'iter' if task == 'segmentation' else 'epoch'
    best = max(values, key=lambda value: value[0])
    texts = [f'{value:{digits}}\n{unit} {step}' for value, step in (values[-1], best)]
    assert found.row(name) == [*texts, key]
    pictures = [source for source in found.sources if source.startswith('data:image/jpeg')]
    assert len(pictures) == (3 if task == 'classification' else 6)
    assert len(found.sources) - len(pictures) == 2  # curves of the loss and of the metrics
    parameters = re.search(r'with LinGlo, \d\.\d M parameters, on the CPU in 1 process', found.text)
    assert parameters
    assert f'best_{key.replace("/", "_")}' in found.text
    head = next(row for row in found.rows if row[0].startswith(('Class', 'Ground truth')))
    rows = found.rows[found.rows.index(head) + 1 :][: 5 if task == 'segmentation' else 4]
    numbers = [[float(cell.rstrip('%')) for cell in row[1:]] for row in rows]
    if task == 'detection':
        assert sum(row[0] for row in numbers) / 4 == pytest.approx(best[0], abs=1e-3)
    elif task == 'segmentation':
        assert sum(row[1] for row in numbers) / 5 == pytest.approx(best[0], abs=0.01)
        assert sum(row[0] for row in numbers) == pytest.approx(100, abs=0.03)
    else:
        right = sum(numbers[i][i] for i in range(4))
        assert 100 * right / sum(map(sum, numbers)) == pytest.approx(best[0])
        assert head[1] == rows[0][0] == ODD
        assert ODD not in found.text
    command = f'tools/train.py {work_dir}/config.py --work-dir {work_dir}'
    assert command in found.text
    assert found.row('torch')[0] == found.row('torch')[1]


def test_labels_are_readable_on_a_phone():
    inside = 390 - 2 * (12 + 16 + 1)  # margins, paddings and borders
    assert page.FONT * inside / page.PICTURE >= 12


def test_some_of_the_validation_images(trained):
    found = report(trained / 'detection' / 'work', '--num', 0, '--max-images', 3)
    assert any(note.startswith('3 of 8 validation images, evenly') for note in found.notes)
    assert 'Ground truth and predictions' not in found.headings


def test_classes_that_are_not_in_the_images(trained):
    found = report(trained / 'segmentation' / 'work', '--num', 0, '--max-images', 1)
    assert any('-' in row for row in found.rows)
    assert 'nan' not in found.text


@pytest.mark.parametrize(
    ('break_it', 'message'),
    [
        (
            lambda work: [path.rename(work / 'deployed.pth') for path in work.glob('*.pth')],
            'has no checkpoint (best_*, epoch_*, iter_*)',
        ),
        (lambda work: [path.write_bytes(b'no') for path in work.glob('*.pth')], 'is damaged'),
        (lambda work: [path.unlink() for path in work.rglob('*.py')], 'has no config (*.py)'),
        (
            lambda work: replace(work, r"data_root=\s*'[^']*'", "data_root='/gone'"),
            "'/gone/val', which val",
        ),
        (lambda work: replace(work, "type='LoadImageFromFile'", "type='Lod'"), 'KeyError: '),
    ],
)
def test_without_predictions(break_it, message, trained, tmp_path, capsys):
    shutil.copytree(trained / 'classification' / 'work', tmp_path / 'work')
    break_it(tmp_path / 'work')
    found = report(tmp_path / 'work')
    assert found.headings[1:] == ['Curves', 'Metrics on the validation data', 'How it was made']
    (note,) = (note for note in found.notes if note.startswith('No predictions'))
    assert message in note
    assert note in capsys.readouterr().out


def replace(work_dir, old, new):
    for path in work_dir.rglob('config.py'):
        path.write_text(re.sub(old, new, path.read_text()))


def log(work_dir, lines, timestamp='20260101_120000'):
    file = work_dir / timestamp / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return file


def lines_with_a_dip():
    lines = []
    for epoch, value in enumerate((0.2, 0.5, 0.1, 0.3), 1):
        losses = {'loss': 4 / epoch, **{f'loss_{i}': i / epoch for i in range(7)}}
        lines.append(dict(losses, lr=0.1, time=0.5, epoch=epoch, iter=10 * epoch, step=10 * epoch))
        metrics = {'coco/bbox_mAP': value, 'coco/bbox_mAP_l': -1.0, 'val_loss': 1 - value}
        lines.append(dict(metrics, data_time=0.1, time=0.2, step=epoch))
    return lines


def test_last_and_best(tmp_path):
    log(tmp_path, lines_with_a_dip())
    found = report(tmp_path)
    last_and_best = ['0.300\nepoch 4', '0.500\nepoch 2', 'coco/bbox_mAP']
    assert found.row('Box AP, mean over overlaps (IoU) from 0.50 to 0.95') == last_and_best
    assert found.row('Box AP, large objects') == ['-', '-', 'coco/bbox_mAP_l']
    assert found.row('val_loss') == ['0.7\nepoch 4', '0.5\nepoch 2', 'val_loss']
    training = page.read_training(tmp_path)
    assert [*training.losses] == ['loss', *(f'loss_{i}' for i in (6, 5, 4, 3, 2))]
    assert [*zip(training.losses['loss'].step, training.losses['loss'].value)] == [
        (10, 4),
        (20, 2),
        (30, pytest.approx(4 / 3)),
        (40, 1),
    ]
    assert [title for title, _ in page.draw_charts(training)] == [
        'Losses in training',
        'Box AP',
        'val_loss',
    ]
    assert any('2026-01-01 at 12:00' in note for note in found.notes)


def test_running_or_killed_training(tmp_path, capsys):
    work_dir = tmp_path / ODD
    file = log(work_dir, lines_with_a_dip())
    log(work_dir, [], '20260102_120000')  # resumed, and nothing logged yet
    file.write_text(file.read_text() + '{"loss": 0.1, "ite')
    found = report(work_dir)
    assert found.headings[0] == ODD
    (note,) = (note for note in found.notes if 'ends in half a line' in note)
    assert note in capsys.readouterr().out
    assert found.row('val_loss')[0] == '0.7\nepoch 4'


def test_long_training(tmp_path):
    log(tmp_path, [dict(loss=1.0, iter=i, step=i) for i in range(1, 1001)])
    ((_, figure),) = page.draw_charts(page.read_training(tmp_path))
    (line,) = figure.axes[0].get_lines()[:1]
    assert len(line.get_xdata()) == page.POINTS
    assert report(tmp_path).headings[1:] == ['Curves', 'How it was made']


@pytest.mark.parametrize(
    ('lines', 'options', 'message'),
    [
        (None, [], "no folder '.*work': give the work dir"),
        ([], [], "work' has nothing in <timestamp>"),
        (['{"loss": 1, "iter": 1}'], [], 'is no log, or a damaged one'),
        (['{"loss": ', '{"loss": 1, "iter": 1, "step": 1}'], [], 'is no log, or a damaged one'),
        (['{"loss": 1, "iter": 1, "step": 1}'], ['--num', '-1'], '--num must not be negative'),
        (['{"loss": 1, "iter": 1, "step": 1}'], ['--device', 'abacus'], "--device 'abacus' cannot"),
        (['{"loss": 1, "iter": 1, "step": 1}'], ['--out', '/proc/x.html'], 'cannot be written'),
    ],
)
def test_mistakes(lines, options, message, tmp_path):
    work_dir = tmp_path / 'work'
    if lines is not None:
        work_dir.mkdir()
    if lines:
        log(work_dir, []).write_text('\n'.join([*lines, '']))
    with pytest.raises(UsageError, match=message):
        report(work_dir, *options)
    assert not list(tmp_path.rglob('*.html'))
