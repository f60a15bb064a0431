# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""A training as one HTML page that needs no other file."""

import base64
import copy
import io
import logging
import math
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import mmcv
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

from mmlinglo.checkpoint import load_model_weights
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.inference import centre_of_largest_row

from .curves import draw_curves, read_log, read_scalars

PARTS_OF_LOSS, POINTS, MATRIX_CLASSES = 5, 200, 30  # more would be hard to read
PICTURE, FONT = 520, 20  # pixels; a phone shows pictures at 340, hence letters at 13
AP = re.compile(r'(?:.*/)?(bbox|segm)_mAP_?(50|75|s|m|l|)$')
NAMES = {
    '': 'mean over overlaps (IoU) from 0.50 to 0.95',  # the first six after "Box AP, "
    '50': 'at an overlap (IoU) of 0.50',
    '75': 'at an overlap (IoU) of 0.75',
    's': 'small objects, below 32 x 32 pixels',
    'm': 'medium objects, up to 96 x 96 pixels',
    'l': 'large objects',
    'aAcc': 'Pixels with the right class (%)',
    'accuracy/top1': 'Accuracy (%)',
    'accuracy/top5': 'Right class among the first five (%)',
    'mAcc': 'Accuracy, mean of the classes (%)',
    'mIoU': 'Overlap (IoU), mean of the classes (%)',
}
FACTS = dict(  # of a training's log
    model=r'INFO - (\S.* M parameters, on .+: \d+ images for training.*)',
    torch=r'\n    PyTorch: (\S+)',
    torchvision=r'\n    TorchVision: (\S+)',
    mmengine=r'\n    MMEngine: (\S+)',
    processes=r'\n    Distributed training: True\n    GPU number: (\d+)',
)
TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #f4f6f8 }
* { box-sizing: border-box }
body { max-width: 1100px; margin: 0 auto; padding: 16px 12px 40px }
h1 { font-size: clamp(1.3rem, 4vw, 1.9rem); line-height: 1.25; margin: 0 0 8px }
h2 { font-size: 1.2rem; margin: 0 0 10px }
h1, p, pre { overflow-wrap: anywhere }
p { margin: 0 0 8px }
section, .note { background: #fff; border: 1px solid #dde3e9; border-radius: 10px; padding: 16px; margin: 16px 0 0 }
.note { background: #fff8e1; border-color: #ecd48a }
.hint, th[scope=col] { color: #52606d }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)) }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)) }
img { display: block; width: 100%; max-width: 520px; height: auto; margin-bottom: 4px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 6px 9px; border-bottom: 1px solid #e6ebf0; text-align: right; white-space: pre }
th:first-child { text-align: left; padding-left: 0; min-width: 8.5rem; font-weight: 500; white-space: normal }
td { background: rgb(61 126 191 / calc(var(--shade, 0) * 55%)) }
pre { background: #f4f6f8; border-radius: 6px; padding: 10px 12px; margin: 0 0 12px; white-space: pre-wrap }
@media (max-width: 480px) { table { font-size: .875rem } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for fact in facts %}<p class="hint">{{ fact }}</p>{% endfor %}
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
{% for section in sections if section.pictures or section.rows %}
<section><h2>{{ section.title }}</h2>
{% for title, text in section.commands %}<p>{{ title }}</p><pre>{{ text }}</pre>{% endfor %}
<p class="hint">{{ section.about }}</p>
<div class="grid{{ section.wide }}">
{% for caption, picture in section.pictures %}
<div><img src="{{ encode(picture) }}" alt="{{ caption }}">{{ caption }}</div>
{% endfor %}
</div>
<div class="scroll"><table>
{% for row in section.rows %}
{% if loop.first %}
<tr>{% for text in section.head %}<th scope="col">{{ text }}</th>{% endfor %}</tr>
{% endif %}
<tr><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}
{% set text, shade = (cell, 0) if cell is string else cell %}
<td style="--shade: {{ '%.2f' % shade }}">{{ text }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
</section>
{% endfor %}
</body>
</html>
"""
PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)


class Training(NamedTuple):
    """What the logs of a training say; curves are as :func:`read_scalars` gives them."""

    name: str
    config: Optional[Path]
    losses: Dict[str, pd.DataFrame]
    metrics: Dict[str, pd.DataFrame]
    facts: Dict[str, str]
    notes: List[str]


def read_training(work_dir: Path) -> Training:
    """Read the logs in a work dir, of a training that may still run or have been killed.

    Args:
        work_dir: Work dir of a training by :file:`tools/train.py`.

    Raises:
        FileNotFoundError: If there is no log, or nothing in it.
        ValueError: If a log is damaged before its last line.
    """
    lines = read_log(work_dir)
    is_training = lines.reindex(columns=['iter']).notna().iter
    training, validation = (
        lines[chosen].dropna(axis=1, how='all') for chosen in (is_training, ~is_training)
    )
    losses = [key for key in training if 'loss' in key]
    losses.sort(key=lambda key: (key != 'loss', -training[key].dropna().iloc[0]))
    losses = losses[: 1 if len(losses) == 2 else 1 + PARTS_OF_LOSS]  # one part is the whole
    no_metrics = [*training, 'step', 'part', 'time', 'data_time']
    metrics = [key for key in validation if key not in no_metrics]
    drawn, judged = (
        {key: read_scalars(work_dir, key) for key in keys} for keys in (losses, metrics)
    )
    for key in filter(AP.match, judged):
        judged[key].loc[judged[key].value < 0, 'value'] = np.nan  # -1: no such objects
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    notes = [
        f'{file} ends in half a line: the training runs or was killed.'
        for file in files
        if file.read_text(errors='replace')[-1:] not in ('', '\n')
    ]
    configs = sorted(work_dir.glob('*.py'), key=lambda path: path.stat().st_mtime)
    name = configs[-1].stem if configs else work_dir.resolve().name
    # tools/test.py may have replaced the one in the work dir.
    configs += [path for path in [files[-1].with_name('config.py')] if path.is_file()]
    log = ''.join(path.read_text(errors='replace') for path in files[-1].parents[1].glob('*.log'))
    found = {key: re.search(pattern, log) for key, pattern in FACTS.items()}
    facts = {key: match[1] for key, match in found.items() if match}
    started = re.match(r'(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)', files[0].parts[-3])
    if started:
        facts['date'] = 'Training started on {}-{}-{} at {}:{}'.format(*started.groups())
    return Training(name, configs[-1] if configs else None, drawn, judged, facts, notes)


def plain_name(key: str) -> str:
    """Name of a validation metric in plain words."""
    found = AP.match(key)
    if found:
        return f'{"Box" if found[1] == "bbox" else "Mask"} AP, {NAMES[found[2]]}'
    return NAMES.get(key, key)


def metric_rows(training: Training) -> List[List[str]]:
    """Name, last and best value, each with its step, and name in the log, of each metric."""
    rows = []
    for key, curve in training.metrics.items():
        name = plain_name(key)
        digits = '.3f' if AP.match(key) else '.2f' if name.endswith('(%)') else '.4g'
        order = curve.sort_values('value', ascending='loss' in key, kind='stable')  # NaN is last
        points = [next(curve.tail(1).itertuples()), next(order.itertuples())]
        cells = [
            f'{point.value:{digits}}\n{point.unit.removesuffix("ation")} {point.step}'
            for point in points
        ]
        rows.append([name, *('-' if cell[:3] == 'nan' else cell for cell in cells), key])
    return rows


def draw_charts(training: Training) -> List[Tuple[str, Figure]]:
    """Titles and curves of losses and metrics; metrics of a single step have none."""
    groups = {'Losses in training': training.losses} if training.losses else {}
    for key, curve in training.metrics.items():
        name = plain_name(key)
        title = 'Validation metrics (%)' if name.endswith('(%)') else name.partition(',')[0]
        if curve.value.count() > 1:
            groups.setdefault(title, {})[key] = curve
    charts = []
    for title, curves in groups.items():
        runs = []
        for label, curve in curves.items():
            bins = np.arange(len(curve)) * POINTS // max(POINTS, len(curve))
            means = curve.groupby(bins)[['step', 'value']].mean()
            runs.append(means.assign(label=label, run=label))
        figure = Figure(figsize=(3.7, 3), layout='constrained')
        axes = figure.subplots()
        draw_curves(axes, pd.concat(runs), curve.unit.iloc[0].title(), '')
        place = dict(
            bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, columnspacing=1, handlelength=1.2
        )
        sns.move_legend(axes, 'lower center', **place)  # within, it may hide a curve
        charts.append((title, figure))
    return charts


class Painter:
    """Draws predictions beside the ground truth.

    Args:
        meta: ``metainfo`` of a data set.
        score_thr: Score from which boxes are drawn.
    """

    def __init__(self, meta: dict, score_thr: float) -> None:
        self.names = [str(name) for name in meta.get('classes') or range(1000)]
        palette = np.array(meta.get('palette') or ())
        if palette.shape != (len(self.names), 3):
            palette = np.array(sns.color_palette('husl', len(self.names))) * 255
        self.colours = [tuple(map(int, colour)) for colour in palette]
        self.font = ImageFont.truetype(findfont('DejaVu Sans'), FONT)
        self.score_thr = score_thr

    def draw(self, sample: Any, info: dict) -> List[Tuple[str, Image.Image]]:
        """Captions and pictures: ground truth and prediction, or both in one.

        Args:
            sample: Data sample of one of the toolboxes, on the CPU.
            info: What the data set has of the image.
        """
        path = sample.get('img_path')  # CIFAR-10 has the pixels
        pixels = info['img'] if path is None else mmcv.imread(path, channel_order='rgb')
        image = Image.fromarray(pixels)
        scale = PICTURE / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size])
        if 'gt_label' in sample:
            truth, found = (self.names[int(x)] for x in (sample.gt_label, sample.pred_label))
            score = f'{float(sample.pred_score.max()):.0%}'
            mark = '✓' if truth == found else '✗'
            return [(f'{mark} Ground truth: {truth}. Prediction: {found} ({score}).', image)]
        if 'gt_sem_seg' in sample:
            maps = (sample.gt_sem_seg.data[0].numpy(), sample.pred_sem_seg.data[0].numpy())
            panels = [self._draw_regions(image, labels) for labels in maps]
            return [*zip(('Ground truth.', 'Prediction.'), panels)]
        boxes = sample.pred_instances[sample.pred_instances.scores >= self.score_thr]
        texts = [f' {score:.2f}' for score in boxes.scores]
        predicted = [*zip(boxes.bboxes.numpy() * scale, boxes.labels.tolist(), texts)]
        kept = [each for each in info['instances'] if not each['ignore_flag']]
        annotated = [(np.array(each['bbox']) * scale, each['bbox_label'], '') for each in kept]
        return [
            (f'{title}, objects: {len(each)}.', self._draw_boxes(image.copy(), each))
            for title, each in (('Ground truth', annotated), ('Prediction', predicted))
        ]

    def _draw_boxes(self, image: Image.Image, boxes: Sequence[tuple]) -> Image.Image:
        draw = ImageDraw.Draw(image)
        taken: List[Sequence] = []
        for box, label, _ in boxes:
            draw.rectangle([*box], outline=self.colours[label], width=3)
        for (left, top, _, bottom), label, text in boxes:
            # Above the box, in its corners, or below it: where nothing is written yet.
            places = [(left, y) for y in (top - FONT - 6, top, bottom - FONT - 6, bottom)]
            self._write(draw, places, self.names[label] + text, label, taken)
        return image

    def _draw_regions(self, image: Image.Image, labels: np.ndarray) -> Image.Image:
        colours = np.array([*self.colours, *[(0, 0, 0)] * 256], np.uint8)[labels]  # 255: no class
        grey = image.convert('L').convert('RGB')  # its own colours may look like those of classes
        image = Image.blend(grey, Image.fromarray(colours).resize(image.size, 0), 0.5)
        for label, name in enumerate(self.names):
            if (labels == label).mean() > 0.01:
                place = centre_of_largest_row(labels == label) * image.width / labels.shape[1]
                place -= (self.font.getlength(name) / 2, FONT / 2)
                self._write(ImageDraw.Draw(image), [place], name, label, [])
        return image

    def _write(self, draw: Any, places: Sequence, text: str, label: int, taken: list) -> None:
        size = np.array([self.font.getlength(text) + 6, FONT + 6])
        boxes = [(c, c + size) for c in np.clip(places, 0, np.maximum(draw.im.size - size, 0))]
        free = [
            b for b in boxes if not any((b[0] < end).all() and (b[1] > x).all() for x, end in taken)
        ]
        taken.append((free or boxes)[0])
        draw.rectangle([*np.ravel(taken[-1])], self.colours[label])
        is_dark = np.dot(self.colours[label], (0.299, 0.587, 0.114)) < 140
        place = (taken[-1][0][0] + 3, taken[-1][0][1] + 1)
        draw.text(place, text, 'white' if is_dark else 'black', self.font)


def predict(
    cfg: Config, checkpoint: dict, source: str, device: str, num: int, limit: int, score_thr: float
) -> List[Dict[str, Any]]:
    """Predict for validation images, evenly spaced.

    Args:
        cfg: Config of the training.
        checkpoint: What :func:`~mmlinglo.utils.load_checkpoint_file` returned.
        source: Name of the checkpoint.
        device: Where the model runs.
        num: How many images to draw.
        limit: How many images to evaluate at most.
        score_thr: Score from which boxes are drawn.

    Returns:
        Sections of the page, with pictures and with a table.

    Raises:
        CheckpointError: If the weights are another model's.
    """
    model = build_model(cfg)
    load_model_weights(model, checkpoint, source)
    model.to(device).eval()
    split = 'val' if cfg.get('val_dataloader') else 'test'
    loader, metric = copy.deepcopy((cfg[f'{split}_dataloader'], cfg[f'{split}_evaluator']))
    dataset = DATASETS.build(loader.dataset)
    evaluator = Evaluator(
        dict(type='ConfusionMatrix') if cfg.default_scope == 'mmpretrain' else metric
    )
    evaluator.dataset_meta = dataset.metainfo
    painter = Painter(dataset.metainfo, score_thr)
    evaluated = _spaced(range(len(dataset)), limit)
    drawn = _spaced(evaluated, num)
    pictures, ids, size = [], [], loader.get('batch_size', 1)
    bar: Dict[str, Any] = dict(console=Console(stderr=True), disable=not sys.stderr.isatty())
    for start in track(range(0, len(evaluated), size), 'Validation images', **bar):
        part = evaluated[start : start + size]
        batch = pseudo_collate([dataset[index] for index in part])
        with torch.no_grad():
            samples = [sample.cpu() for sample in model.val_step(batch)]
        evaluator.process(samples, batch)
        ids += [sample.get('img_id') for sample in samples]
        for index, sample in zip(part, samples):
            if index in drawn:
                panels = painter.draw(sample, dataset.get_data_info(index))
                name = Path(sample.get('img_path') or f'Image {index}').name
                pictures += [(f'{name}. {text}', image) for text, image in panels]
    counts = [
        f'{len(each)} of {len(dataset)} validation images, evenly spaced'
        if len(each) < len(dataset)
        else f'All {len(each)} validation images'
        for each in (drawn, evaluated)
    ]
    about = f'. Predictions of {Path(source).name}'
    boxes = f'; boxes with a score of at least {score_thr:g}' * (cfg.default_scope == 'mmdet')
    title, wide = 'Ground truth and predictions', ' pairs' * (cfg.default_scope != 'mmpretrain')
    drawings = dict(title=title, about=f'{counts[0]}{about}{boxes}.', pictures=pictures, wide=wide)
    table = _judge_classes(evaluator, painter.names, ids)
    return [drawings, dict(table, about=f'{counts[1]}{about}.')]


def _spaced(items: Sequence[int], number: int) -> List[int]:
    places = np.linspace(0, len(items) - 1, min(number, len(items)))
    return [items[int(place)] for place in places]


def _judge_classes(evaluator: Evaluator, names: List[str], ids: list) -> Dict[str, Any]:
    """Title, head and rows of a table; a number in it is a text with a shade from 0 to 1."""
    metric = evaluator.metrics[0]
    if hasattr(metric, 'intersect_and_union'):  # mmseg's
        overlap, union, _, truth = (sum(each).numpy() for each in zip(*metric.results))
        columns = (truth / truth.sum(), overlap / union, overlap / truth)
        rows = [[name, *(_cell(x, '.2%') for x in row)] for name, *row in zip(names, *columns)]
        head = ['Class', 'Of all pixels', 'IoU', 'Pixels found']
        return dict(title='Overlap (IoU) of the classes', head=head, rows=rows)
    metric.classwise, metric.img_ids, metric.metrics = True, ids, ['bbox']  # of mmdet's CocoMetric
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        result = evaluator.evaluate(len(ids))
    logger.setLevel(level)
    if 'confusion_matrix/result' in result:
        matrix = result['confusion_matrix/result'].numpy()
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        rows = [[n, *zip(map(str, row), share)] for n, row, share in zip(names, matrix, shares)]
        rows = rows if len(rows) <= MATRIX_CLASSES else []
        head = ['Ground truth ↓ prediction →', *names[: len(matrix)]]
        return dict(title='Confusion matrix', head=head, rows=rows)
    found = {
        key[key.find('/') + 1 : -10]: ap for key, ap in result.items() if key.endswith('_precision')
    }
    rows = [[name, _cell(ap, '.3f')] for name, ap in found.items()]
    return dict(title='AP of the classes', head=['Class', 'AP'], rows=rows)


def _cell(share: float, spec: str) -> Any:
    return '-' if math.isnan(share) else (format(share, spec), share)


def render(
    training: Training, commands: List[Tuple[str, str]], versions: Dict[str, str], found: List[dict]
) -> str:
    """The page; all texts in it are escaped.

    Args:
        training: From :func:`read_training`.
        commands: Titles and command lines.
        versions: Software with which the page is made.
        found: From :func:`predict`, or empty.
    """
    facts = (training.facts.get('model'), training.facts.get('date'))
    software = [[name, training.facts.get(name, '-'), text] for name, text in versions.items()]
    head = ['Metric', 'Last', 'Best', 'Name in the log']
    metrics = dict(title='Metrics on the validation data', head=head, rows=metric_rows(training))
    head, about = ['Software', 'In training', 'For this page'], 'A dash: the log does not say.'
    made = dict(title='How it was made', about=about, head=head, rows=software, commands=commands)
    curves = dict(title='Curves', pictures=draw_charts(training))
    sections = [curves, metrics, *found, made]
    texts = dict(title=training.name, facts=filter(None, facts), notes=training.notes)
    return PAGE.render(texts, sections=sections, encode=_encode)


def _encode(image: Union[Figure, Image.Image]) -> str:
    """Make the URI of a picture."""
    file = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(file, format='svg')
    else:
        image.save(file, 'JPEG', quality=88)
    kind = 'svg+xml' if isinstance(image, Figure) else 'jpeg'
    return f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}'
