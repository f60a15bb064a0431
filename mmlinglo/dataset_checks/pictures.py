# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Open many images."""

import io
import os.path as osp
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, TextIO, Tuple

import mmcv
import numpy as np
from mmengine.fileio import LocalBackend
from mmengine.utils import track_parallel_progress, track_progress
from PIL import Image

from .splits import Split

Problem = Tuple[str, str]  # key of CHECKS, place
Shape = Tuple[int, int]  # height, width in pixels
PICTURE_SUFFIXES = (
    *('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm'),
    *('.gif', '.heic', '.avif', '.jp2'),
)


class Picture(NamedTuple):
    """An image file, the size that the annotations state, and how training decodes it."""

    path: str
    shape: Optional[Tuple[float, float]] = None
    flag: str = 'color'
    backend: str = 'cv2'


def loading(split: Split) -> dict:
    """Find the ``flag`` and ``backend`` with which the pipeline of a data set decodes images."""
    step = split.step('LoadImageFromFile')
    return dict(flag=step.get('color_type', 'color'), backend=step.get('imdecode_backend', 'cv2'))


class Opener(NamedTuple):
    """Opens images in parallel: ``num`` of each data set, evenly spaced, or all if it is None."""

    num: Optional[int]
    workers: int
    progress: Optional[TextIO]

    def run(self, function: Callable[[Any], Any], items: Sequence[Any], title: str) -> List[Any]:
        """Call ``function``, which must be picklable, for a sample of ``items``, and return the results."""
        if self.num is not None and len(items) > self.num:
            items = [items[i] for i in np.linspace(0, len(items) - 1, self.num).astype(int)]
        if not items:
            return []
        file = self.progress or io.StringIO()
        file.write(f'{title}: opening {len(items)} images\n')
        if self.workers == 1:
            return track_progress(function, items, file=file)
        return track_parallel_progress(function, items, self.workers, chunksize=8, file=file)


def check_pictures(split: Split, pictures: Sequence[Picture], opener: Opener) -> None:
    """Check that all images of a data set exist, and open all or a sample of them."""
    there = existing(split, [picture.path for picture in pictures], 'picture-missing')
    pictures_there = [picture for picture in pictures if picture.path in there]
    results = opener.run(inspect_picture, pictures_there, split.name)
    for problems in results:
        for check, place in problems:
            split.add(check, place)
    split.count(pictures=len(pictures), opened=len(results))


def existing(split: Split, paths: Sequence[str], check: str) -> set:
    """Return the paths that are files, and report the others."""
    there = {path for path in paths if osp.isfile(path)}
    for path in paths:
        if path not in there:
            split.add(check, path)
    return there


def inspect_picture(picture: Picture) -> List[Problem]:
    """Open one image and compare its size with the annotated one."""
    problems, shape = decode(picture)
    if shape is not None and picture.shape is not None and shape != picture.shape:
        place = f'{picture.path}: {size(shape)}, annotated {size(picture.shape)}'
        problems.append(('picture-size', place))
    return problems


def decode(picture: Picture) -> Tuple[List[Problem], Optional[Shape]]:
    """Decode an image as training does. Return what is wrong with it, and its size if it can be read."""
    data = Path(picture.path).read_bytes()
    if not data:
        return [('picture-unreadable', f'{picture.path}: empty file')], None
    try:
        image = mmcv.imfrombytes(data, flag=picture.flag, backend=picture.backend)
    except Exception:  # whatever the backend raises for a damaged file
        image = None
    shape = None if image is None else image.shape[:2]
    if is_truncated(data):
        return [('picture-truncated', picture.path)], shape
    if image is None:
        return [('picture-unreadable', f'{picture.path}: {picture.backend} cannot decode it')], None
    return [], shape


def is_truncated(data: bytes) -> bool:
    """Whether data is missing from an image. OpenCV below 4.12 decodes it anyway."""
    try:
        image = Image.open(io.BytesIO(data))
    except (
        OSError,
        Image.DecompressionBombError,
    ):  # a format that only OpenCV reads, or a very large image
        return False
    try:
        image.load()
    except OSError:
        return True
    return False


def other_pictures(folder: str, suffixes: Tuple[str, ...]) -> List[str]:
    """List the images in and below a folder whose names do not end in one of ``suffixes``, sorted."""
    files = LocalBackend().list_dir_or_file(folder, list_dir=False, recursive=True)
    pictures = (path for path in files if path.lower().endswith(PICTURE_SUFFIXES))
    return sorted(osp.join(folder, path) for path in pictures if not path.endswith(suffixes))


def size(shape: Tuple[float, float]) -> str:
    """Write a size as width x height."""
    return f'{shape[1]} x {shape[0]}'
