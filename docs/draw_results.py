# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Draw README's pictures: docs/images/speed.svg from docs/results, docs/images/detection.jpg from predictions.

For the second, put BCCD where configs/quickstart/retinanet_linglo-b0_fpn_2xb4-20e_bccd-320x240.py expects it, then:

bash tools/dist_train.sh configs/quickstart/retinanet_linglo-b0_fpn_2xb4-20e_bccd-320x240.py 2 --work-dir work_dirs/bccd
python tools/infer.py configs/quickstart/retinanet_linglo-b0_fpn_2xb4-20e_bccd-320x240.py work_dirs/bccd/epoch_20.pth \
    data/bccd/val/BloodImage_00038.jpg --out-dir work_dirs/bccd
python docs/draw_results.py data/bccd work_dirs/bccd/preds/BloodImage_00038.json
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Iterable, List, Tuple

from draw_diagrams import IMAGES, picture, text
from PIL import Image, ImageDraw, ImageFont

COLOURS = {'RBC': '#d62728', 'WBC': '#1f4fd8', 'Platelets': '#0b8a3a'}
Boxes = Iterable[Tuple[str, List[float]]]


def draw_speed(table: Path) -> str:
    """Bars of the time for an image, LinGlo and PVTv2 in turn."""
    with table.open() as file:
        seconds = {row['model']: float(row['latency_ms']) / 1000 for row in csv.DictReader(file)}
    parts = [text(180, 20, 'Seconds for an image of 800 x 1333'), text(180, 38, 'on two CPU cores')]
    scale, y = 200 / max(seconds[f'pvt_v2_b{i}'] for i in range(3)), 50
    for i in range(3):
        for name, model, fill in (
            (f'LinGlo-b{i}', f'linglo_b{i}', '#3d7ebf'),
            (f'PVTv2-B{i}', f'pvt_v2_b{i}', '#b0b0b0'),
        ):
            width = round(scale * seconds[model])
            parts += [text(52, y + 15, name)]
            parts += [f'<rect x="100" y="{y}" width="{width}" height="20" fill="{fill}"/>']
            parts += [text(122 + width, y + 15, f'{seconds[model]:.2f}')]
            y += 22
        y += 8
    return picture(y + 4, parts)


def draw_boxes(image: Image.Image, title: str, boxes: Boxes) -> Image.Image:
    """The image with boxes in the colour of their class, under a title."""
    panel = Image.new('RGB', (image.width, image.height + 44), 'white')
    panel.paste(image, (0, 44))
    draw = ImageDraw.Draw(panel)
    draw.text((4, 4), title, 'black', ImageFont.load_default(30))
    for name, (left, top, right, bottom) in boxes:
        draw.rectangle((left, top + 44, right, bottom + 44), outline=COLOURS[name], width=5)
    return panel


def draw_detection(root: Path, prediction: Path, threshold: float = 0.4) -> Image.Image:
    """Annotated and predicted boxes of a validation image side by side, over a legend."""
    coco = json.loads((root / 'annotations/val.json').read_text())
    name = f'{prediction.stem}.jpg'
    record = next(each for each in coco['images'] if each['file_name'] == name)
    names = {each['id']: each['name'] for each in coco['categories']}
    truth = [
        (names[each['category_id']], [x, y, x + width, y + height])
        for each in coco['annotations']
        for x, y, width, height in [each['bbox']]
        if each['image_id'] == record['id']
    ]
    found = json.loads(prediction.read_text())
    rows = zip(found['scores'], found['labels'], found['bboxes'])
    predicted = [(list(COLOURS)[label], box) for score, label, box in rows if score >= threshold]
    image = Image.open(root / 'val' / name).convert('RGB')
    panels = [draw_boxes(image, 'Ground truth', truth), draw_boxes(image, 'LinGlo-b0', predicted)]
    width, height = panels[0].size
    sheet = Image.new('RGB', (2 * width + 16, height + 44), 'white')
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * (width + 16), 0))
    x, draw = 4, ImageDraw.Draw(sheet)
    for name, colour in COLOURS.items():
        draw.text((x, height + 6), f'■ {name}', colour, ImageFont.load_default(30))
        x += 260
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('root', type=Path, nargs='?', help='folder of BCCD')
    parser.add_argument('prediction', type=Path, nargs='?', help='JSON file of tools/infer.py')
    args = parser.parse_args()
    results = Path(__file__).parent / 'results'
    speed = draw_speed(results / 'benchmark_backbones_cpu_800x1333.csv')
    (IMAGES / 'speed.svg').write_text(speed)
    if args.prediction:
        draw_detection(args.root, args.prediction).save(IMAGES / 'detection.jpg', quality=90)


if __name__ == '__main__':
    main()
