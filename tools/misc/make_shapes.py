# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Make a small synthetic data set: scenes of textured shapes, labelled for all three tasks.

The tool writes the same scenes in the layout of each task::

    OUT/coco/{train,val}/*.jpg, OUT/coco/annotations/{train,val}.json      boxes, as COCO
    OUT/ade/{images,annotations}/{training,validation}/*                   masks, as ADE20K (0 = unlabelled)
    OUT/imagenet/{train,val}/<class>/*.jpg                                 one class per scene, as ImageNet
    OUT/demo/*.jpg                                                         unlabelled, enlarged, for inference

A scene's class is the class of its largest shape, which is clearly larger than the others.
"""

import argparse
import tempfile
from pathlib import Path
from typing import List, Optional, Tuple

import cv2
import mmcv
import mmengine
import numpy as np

from mmlinglo.analysis.report import at_least
from mmlinglo.utils.cli import UsageError, run

CORNERS = dict(disc=48, square=4, triangle=3, star=10)
CLASSES = tuple(CORNERS)
BACKGROUND_LABEL = 1  # in the masks, before the classes; 0 is ADE20K's "unlabelled"


def noise(rng: np.random.Generator, size: int, cells: int, channels: int) -> np.ndarray:
    """Smooth random field in [0, 1], (size, size, channels)."""
    field = rng.random((cells, cells, channels)).astype(np.float32)
    field = cv2.resize(field, (size, size), interpolation=cv2.INTER_CUBIC)
    return field.clip(0, 1).reshape(size, size, channels)


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Stripes, a chequerboard or blotches in two random colours, (size, size, 3) in [0, 1]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(8, 20)
    u = (x * np.cos(angle) + y * np.sin(angle)) * frequency
    v = (y * np.cos(angle) - x * np.sin(angle)) * frequency
    patterns = [np.sin(u * 2 * np.pi) > 0, (np.floor(u) + np.floor(v)) % 2 > 0]
    pattern = rng.integers(3)
    blend = patterns[pattern] if pattern < 2 else noise(rng, size, 12, 1)[..., 0] > 0.5
    first = rng.permutation([1.0, rng.uniform(0, 1), rng.uniform(0, 0.3)])  # a saturated colour
    second = 0.6 * first + 0.4 * rng.random(3)
    return np.where(blend[..., None], first, second)


def corners_of(name: str, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Corners of a shape whose circumscribed circle is given, (K, 2)."""
    angles = angle + np.linspace(0, 2 * np.pi, CORNERS[name], endpoint=False)
    if name == 'square':
        angles += np.pi / 4
    radii = np.full(len(angles), radius)
    if name == 'star':
        radii[1::2] *= 0.42
    return centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def make_scene(rng: np.random.Generator, size: int) -> Tuple[np.ndarray, List[tuple]]:
    """One scene of one large and up to four small shapes that do not touch.

    Args:
        rng: Source of randomness.
        size: Height and width in pixels.

    Returns:
        The BGR image, (size, size, 3) of uint8, and of each shape, the largest first, its class
        index, corners (K, 2) in pixels, and mask (size, size) of uint8.
    """
    # a dull background and bright shapes: small ones must be learnt within minutes
    image = 0.3 + 0.3 * noise(rng, size, 5, 1) + 0.15 * noise(rng, size, 5, 3)
    placed: List[tuple] = []
    shapes = []
    for i in range(1 + rng.integers(5)):
        for _ in range(50):
            radius = size * (rng.uniform(0.22, 0.34) if i == 0 else rng.uniform(0.09, 0.14))
            centre = rng.uniform(radius, size - radius, 2)
            if all(np.hypot(*(centre - c)) > radius + r + 2 for c, r in placed):
                break
        else:
            continue
        placed.append((centre, radius))
        label = int(rng.integers(len(CLASSES)))
        angle = rng.uniform(-0.4, 0.4) - np.pi / 2  # nearly upright, the first corner on top
        corners = corners_of(CLASSES[label], centre, radius, angle)
        mask = np.zeros((size, size), np.uint8)
        cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1)
        image = np.where(mask[..., None] > 0, texture(rng, size), image)
        shapes.append((label, corners, mask))
    image = image + rng.normal(0, 0.03, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), shapes


def write_split(root: Path, split: str, count: int, size: int, rng: np.random.Generator) -> None:
    """Write the scenes of ``'train'`` or ``'val'`` in all three layouts."""
    ade_split = dict(train='training', val='validation')[split]
    for name in CLASSES:
        (root / 'imagenet' / split / name).mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(count):
        image, shapes = make_scene(rng, size)
        name, by_class = f'{image_id:06d}.jpg', f'imagenet/{split}/{CLASSES[shapes[0][0]]}'
        for folder in (f'coco/{split}', f'ade/images/{ade_split}', by_class):
            mmcv.imwrite(image, str(root / folder / name))
        labels = np.full((size, size), BACKGROUND_LABEL, np.uint8)
        images.append(dict(id=image_id, file_name=name, width=size, height=size))
        for label, corners, mask in shapes:
            labels[mask > 0] = BACKGROUND_LABEL + 1 + label
            number = len(annotations) + 1  # pycocotools takes a match with id 0 for none
            annotation = dict(id=number, image_id=image_id, category_id=label + 1, iscrowd=0)
            annotation.update(bbox=cv2.boundingRect(mask), area=int(mask.sum()))
            annotation.update(segmentation=[corners.round(1).ravel().tolist()])
            annotations.append(annotation)
        mmcv.imwrite(labels, str(root / f'ade/annotations/{ade_split}/{image_id:06d}.png'))
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    content = dict(images=images, annotations=annotations, categories=categories)
    mmengine.dump(content, root / f'coco/annotations/{split}.json')


def write_demo(folder: Path, count: int, size: int, rng: np.random.Generator) -> None:
    for i in range(count):
        # Compressed before enlarging, as the training scenes are: the same noise, the same blur.
        image = cv2.imdecode(cv2.imencode('.jpg', make_scene(rng, size)[0])[1], cv2.IMREAD_COLOR)
        image = cv2.resize(image, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
        mmcv.imwrite(image, str(folder / f'{i:06d}.jpg'))


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('out', help='folder to make; it must not exist, unless it holds the same data set')
    add('--num-train', type=at_least(0), default=1200, help='training scenes')
    add('--num-val', type=at_least(0), default=120, help='validation scenes')
    add('--num-demo', type=at_least(0), default=6, help='unlabelled scenes, enlarged 3 times')
    add('--size', type=at_least(32), default=160, help='height and width in pixels')
    add('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    settings = dict(vars(args))
    out = Path(settings.pop('out'))
    record = out / 'settings.json'
    if record.is_file() and mmengine.load(record) == settings:
        print(f'{out} exists already, with these settings')
        return 0
    if out.exists():
        raise UsageError(
            f'{out} exists and was not made with {settings}: remove it or name another folder'
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as folder:
        work = Path(folder, out.name)
        # One generator per split, so that the size of one split does not change the others.
        train, val, demo = np.random.default_rng(args.seed).spawn(3)
        write_split(work, 'train', args.num_train, args.size, train)
        write_split(work, 'val', args.num_val, args.size, val)
        write_demo(work / 'demo', args.num_demo, args.size, demo)
        mmengine.dump(settings, work / record.name)
        work.rename(out)
    print(f'{out}/: {args.num_train} training and {args.num_val} validation scenes')
    return 0


if __name__ == '__main__':
    run(main)
