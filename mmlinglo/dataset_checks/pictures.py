# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Opening many pictures."""

import io
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, TextIO, Tuple

import mmcv
import numpy as np
from mmengine.fileio import LocalBackend
from mmengine.utils import track_parallel_progress, track_progress
from PIL import Image

from .report import Report
from .splits import Split

Problem = Tuple[str, str]  # key of CHECKS, place
PICTURE_SUFFIXES = (
    *('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm'),
    *('.gif', '.heic', '.avif', '.jp2'),
)


class Picture(NamedTuple):
    """A picture to open.

    Attributes:
        path: File.
        shape: Height and width in pixels that the annotations state, if they do.
        flag: How training decodes it, see :func:`mmcv.imfrombytes`.
        backend: What training decodes it with.
    """

    path: str
    shape: Optional[Tuple[int, int]] = None
    flag: str = 'color'
    backend: str = 'cv2'


def loading(split: Split) -> dict:
    """``flag`` and ``backend`` with which the pipeline of a data set decodes pictures."""
    step = split.step('LoadImageFromFile')
    return dict(flag=step.get('color_type', 'color'), backend=step.get('imdecode_backend', 'cv2'))


class Opener:
    """Opens pictures in parallel, not more than a number of them, with a progress bar.

    Args:
        num: Pictures to open of each data set, evenly spaced; None for all.
        workers: Processes.
        progress: Where the progress bar goes; None for nowhere.
    """

    def __init__(self, num: Optional[int], workers: int, progress: Optional[TextIO]) -> None:
        self.num = num
        self.workers = workers
        self.progress = progress or io.StringIO()

    def run(self, function: Callable[[Any], Any], items: Sequence[Any], title: str) -> List[Any]:
        """Results of ``function``, which can be pickled, for a sample of ``items``."""
        if self.num is not None and len(items) > self.num:
            items = [items[i] for i in np.linspace(0, len(items) - 1, self.num).astype(int)]
        if not items:
            return []
        self.progress.write(f'{title}: opening {len(items)} pictures\n')
        if self.workers == 1:
            return track_progress(function, items, file=self.progress)
        return track_parallel_progress(
            function, items, self.workers, chunksize=8, file=self.progress
        )


def check_pictures(
    split: Split, pictures: Sequence[Picture], report: Report, opener: Opener
) -> None:
    """See that all pictures exist, and open them or a sample of them.

    Args:
        split: Data set of the pictures.
        pictures: All its pictures.
        report: Findings go here, and the number of pictures.
        opener: Opens the pictures.
    """
    there = existing(split, [picture.path for picture in pictures], 'picture-missing', report)
    results = opener.run(
        inspect_picture, [picture for picture in pictures if picture.path in there], split.name
    )
    for problems in results:
        for check, place in problems:
            report.add(check, split.name, place)
    report.datasets[split.name].update(pictures=len(pictures), opened=len(results))


def existing(split: Split, paths: Sequence[str], check: str, report: Report) -> set:
    """Those of the paths that are files; the others are reported."""
    there = {path for path in paths if Path(path).is_file()}
    for path in paths:
        if path not in there:
            report.add(check, split.name, path)
    return there


def inspect_picture(picture: Picture) -> List[Problem]:
    """Open one picture and compare its size with the annotated one."""
    problems, shape = decode(picture)
    if shape is not None and picture.shape is not None and shape != picture.shape:
        problems.append(
            ('picture-size', f'{picture.path}: {size(shape)}, annotated {size(picture.shape)}')
        )
    return problems


def decode(picture: Picture) -> Tuple[List[Problem], Optional[Tuple[int, int]]]:
    """Decode a picture as training does.

    Returns:
        What is wrong with it, and its height and width in pixels, None if it
        cannot be read.
    """
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
        return [('picture-unreadable', f'{picture.path}: no picture for {picture.backend}')], None
    return [], shape


def is_truncated(data: bytes) -> bool:
    """Whether data is missing from a picture; OpenCV below 4.12 decodes it all the same."""
    try:
        image = Image.open(io.BytesIO(data))
    except (OSError, Image.DecompressionBombError):  # a format of OpenCV's only, or very large
        return False
    try:
        image.load()
    except OSError:
        return True
    return False


def other_pictures(folder: str, suffixes: Tuple[str, ...]) -> List[str]:
    """Pictures in and below a folder whose names do not end in one of ``suffixes``, sorted."""
    files = LocalBackend().list_dir_or_file(folder, list_dir=False, recursive=True)
    return sorted(
        path
        for path in files
        if path.lower().endswith(PICTURE_SUFFIXES) and not path.endswith(suffixes)
    )


def size(shape: Tuple[int, int]) -> str:
    """Height and width as people write sizes."""
    return f'{shape[1]} x {shape[0]}'
