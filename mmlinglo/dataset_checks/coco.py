# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The structure of an annotation file in COCO format, as far as mmdet and pycocotools read it."""

import json
import math
import re
import reprlib
from typing import (
    Annotated,
    Any,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Type,
    Union,
)

import numpy as np

try:
    import msgspec
except ImportError as error:
    raise ImportError('checking data sets needs msgspec: pip install msgspec') from error
from msgspec import Meta, ValidationError

from .splits import encoding_problem

Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Id = Union[Integer, float, str]
Length = Union[Annotated[int, Meta(ge=1, le=2**31)], Annotated[float, Meta(gt=0)]]  # in pixels
Flag = Union[bool, Annotated[int, Meta(ge=0, le=1)], Annotated[float, Meta(ge=0, le=1)]]
Box = Tuple[float, float, float, float]


class Image(msgspec.Struct):
    id: Id
    file_name: str
    width: Length
    height: Length


class Category(msgspec.Struct):
    id: Id
    name: str


class Annotation(msgspec.Struct):
    """An object. Boxes and masks are converted later, with their own messages."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: Any
    area: Annotated[float, Meta(le=1e10)]  # COCOeval counts no larger objects
    iscrowd: Optional[Flag] = None
    ignore: Optional[Flag] = None
    segmentation: Any = None


class RunLengths(msgspec.Struct):
    """A mask, column by column: numbers of pixels without the object, with it, without it, ..."""

    size: Tuple[Integer, Integer]  # height, width
    counts: Union[str, List[Annotated[int, Meta(ge=0, le=2**31)]]]


Segmentation = Union[List[List[float]], RunLengths]
PARTS: Dict[str, Type[msgspec.Struct]] = dict(
    images=Image, annotations=Annotation, categories=Category
)


class Coco(NamedTuple):
    """The entries of a file that can be used, and the ids of all images and all categories."""

    images: List[Image]
    annotations: List[Annotation]
    categories: List[Category]
    ids: Dict[str, Set[Id]]


class UnreadableError(Exception):
    """The file is not JSON, or lacks one of its lists."""


def read(path: str, optional: Tuple[str, ...] = ()) -> Tuple[Coco, List[Tuple[str, str]]]:
    """Read an annotation file in the same way as pycocotools.

    Args:
        path: The file.
        optional: Lists that the file may lack.

    Returns:
        The usable entries; and for each of the others, the key of a check and the place.

    Raises:
        UnreadableError: If the file is not JSON, or lacks one of its lists.
    """
    try:
        with open(path) as file:
            content = json.load(file)
    except (ValueError, RecursionError, OSError) as error:
        raise UnreadableError(f'{path}: {encoding_problem(path) or error}') from error
    if not isinstance(content, dict):
        raise UnreadableError(f'{path}: not an object of lists, but {reprlib.repr(content)}')
    content = {**{part: [] for part in optional}, **content}
    lacking = [repr(part) for part in PARTS if not isinstance(content.get(part), list)]
    if lacking:
        raise UnreadableError(f'{path}: no list {" and no list ".join(lacking)}')
    problems: List[Tuple[str, str]] = []
    parts = {part: list(_convert(content[part], part, path, problems)) for part in PARTS}
    ids = {
        part: {entry['id'] for entry in content[part] if _has_id(entry)}
        for part in ('images', 'categories')
    }
    return Coco(**parts, ids=ids), problems


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get('id'), (int, float, str))


def _convert(
    entries: List[Any], part: str, path: str, problems: List[Tuple[str, str]]
) -> Iterator[Any]:
    kind = PARTS[part]
    for i, entry in enumerate(entries):
        try:
            yield convert(entry, kind)
        except ValidationError as error:
            place, fields = f'{path}: {part}[{i}]', msgspec.structs.fields(kind)
            keys = entry if isinstance(entry, dict) else [field.name for field in fields]
            missing = [field.name for field in fields if field.required and field.name not in keys]
            if missing:
                problems.append(('annotation-incomplete', f'{place} lacks {", ".join(missing)}'))
            else:
                problems.append(('value-invalid', f'{place}{explain(entry, error)}'))


def convert(value: Any, kind: Any) -> Any:
    """Convert a value from JSON to a type.

    Raises:
        ValidationError: If the value does not fit the type.
    """
    try:
        return msgspec.convert(value, kind)
    except UnicodeEncodeError as error:  # "\\ud800", which is valid in JSON
        raise ValidationError(f'Invalid text: {error.reason}') from error


def explain(value: Any, error: Exception) -> str:
    """Describe what a conversion found wrong, and where in the value. It follows the name of the value."""
    message, _, where = str(error).replace('`', '').partition(' - at $')
    for index, key in re.findall(r'\[(\d+)\]|\.(\w+)', where):
        value = value[int(index) if index else key]
    return f'{where} is {reprlib.repr(value)}: {message[0].lower()}{message[1:]}'


def box_of(annotation: Annotation) -> Box:
    """Return the ``[x, y, width, height]`` of an annotation, or four NaN if it is not four numbers."""
    try:
        return convert(annotation.bbox, Box)
    except ValidationError:
        return (math.nan,) * 4


def mask_problem(annotation: Annotation, image: Image, box: Box) -> Optional[str]:
    """Describe what is wrong with the segmentation of an annotation, or return None.

    Args:
        annotation: An annotation with a segmentation that is not empty.
        image: Its image.
        box: ``[x, y, width, height]`` in pixels.
    """
    try:
        mask = convert(annotation.segmentation, Segmentation)
    except ValidationError as error:
        return f'segmentation{explain(annotation.segmentation, error)}'
    if isinstance(mask, RunLengths):
        return _run_problem(mask, (image.height, image.width))
    for i, polygon in enumerate(mask):
        if len(polygon) % 2 or len(polygon) < 6:
            return f'polygon {i} has {len(polygon)} values, not x, y of three or more points'
    points = np.array([value for polygon in mask for value in polygon]).reshape(-1, 2)
    if not np.isfinite(points).all():
        return 'a point of a polygon is not finite'
    (left, top), (right, bottom) = points.min(0), points.max(0)
    x, y, width, height = box
    if left > x + width or top > y + height or right < x or bottom < y:
        span = f'[{left:g}, {top:g}, {right - left:g}, {bottom - top:g}]'
        return f'the polygons span {span}, apart from the box {annotation.bbox}'
    return None


def _run_problem(mask: RunLengths, shape: Tuple[float, float]) -> Optional[str]:
    if mask.size != shape:
        return f'RLE of size {list(mask.size)}, but the image has {list(shape)}'
    try:
        counts = _decode_counts(mask.counts) if isinstance(mask.counts, str) else mask.counts
    except ValueError:
        return f'RLE counts {reprlib.repr(mask.counts)} cannot be decoded'
    pixels = int(shape[0] * shape[1])
    if sum(counts) != pixels:
        return f'RLE counts of {sum(counts)} pixels, but the image has {pixels}'
    return None if sum(counts[1::2]) else 'RLE without a pixel of the object'


def _decode_counts(text: str) -> List[int]:
    """Decode COCO's compressed RLE. pycocotools reads beyond the end of a damaged one.

    Each character holds five bits, and a bit that says whether more follow. From the fourth
    number on, the text holds differences to the last number but one.

    Raises:
        ValueError: If the text is damaged.
    """
    counts: List[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64:
            raise ValueError
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            value += counts[-2] if len(counts) > 2 else 0
            if value < 0:
                raise ValueError
            counts.append(value)
            value = shift = 0
    if shift:
        raise ValueError
    return counts
