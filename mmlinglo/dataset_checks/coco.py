# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The structure of an annotation file in COCO format, as far as mmdet and pycocotools read it."""

import json
import math
import re
import reprlib
from collections import Counter
from typing import Annotated, Any, Dict, List, Optional, Tuple, Union

import msgspec
import numpy as np
from msgspec import Meta, ValidationError

from .splits import Split

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
PARTS: Dict[str, Any] = dict(images=Image, annotations=Annotation, categories=Category)
UNIQUE = (  # checks of keys whose values differ in all entries of a list
    ('category-duplicate', 'categories', 'id'),
    ('category-duplicate', 'categories', 'name'),
    ('image-duplicate', 'images', 'id'),
    ('file-duplicate', 'images', 'file_name'),
    ('annotation-duplicate', 'annotations', 'id'),
)


class Coco:
    """The entries of an annotation file that can be used. The others are reported.

    Args:
        split: Data set of the file.
        content: Lists of the file.

    Attributes:
        images: By id.
        categories: Names by id, in the order of the file.
        annotations: All annotations.
        kept: Those whose image and category can be used too, with both.
    """

    def __init__(self, split: Split, content: Dict[str, List[Any]]) -> None:
        self.split = split
        parts = {part: self.convert(part, content[part]) for part in PARTS}
        self.annotations: List[Annotation] = parts['annotations']
        self.images: Dict[Id, Image] = {image.id: image for image in parts['images']}
        self.categories: Dict[Id, str] = {each.id: each.name for each in parts['categories']}
        self.kept: List[Tuple[Annotation, Image, str]] = []
        for check, part, key in UNIQUE:
            for value, count in Counter(getattr(entry, key) for entry in parts[part]).items():
                if count > 1:
                    self.add(check, f'{key} {value!r}')
        if not self.images:
            self.add('pictures-none', '`images` is empty')
        # Entries that cannot be used are in the file all the same.
        entries = ((part, e) for part in ('images', 'categories') for e in content[part])
        ids = {(part, repr(e['id'])) for part, e in entries if isinstance(e, dict) and 'id' in e}
        for annotation in self.annotations:
            image = self.images.get(annotation.image_id)
            name = self.categories.get(annotation.category_id)
            if name is not None and image is not None:
                self.kept.append((annotation, image, name))
            elif name is None and ('categories', repr(annotation.category_id)) not in ids:
                fact = f'category_id {annotation.category_id!r}'
                self.add('annotation-category', fact, annotation)
            elif image is None and ('images', repr(annotation.image_id)) not in ids:
                self.add('annotation-image', f'image_id {annotation.image_id!r}', annotation)

    def add(self, check: str, fact: str, annotation: Optional[Annotation] = None) -> None:
        """Report a defect of the file, or of an annotation."""
        place = f'{self.split.dataset.ann_file}: '
        if annotation is not None:
            image = self.images.get(annotation.image_id)
            file = f', {image.file_name}' if image else ''
            place += f'annotation {annotation.id}{file}: '
        self.split.add(check, place + fact)

    def convert(self, part: str, entries: List[Any]) -> List[Any]:
        """Convert the entries of a list, and report those that do not fit its type."""
        converted, fields = [], msgspec.structs.fields(PARTS[part])
        for i, entry in enumerate(entries):
            try:
                converted.append(convert(entry, PARTS[part]))
            except ValidationError as error:
                required = [field.name for field in fields if field.required]
                keys = entry if isinstance(entry, dict) else required
                missing = [name for name in required if name not in keys]
                if missing:
                    self.add('annotation-incomplete', f'{part}[{i}] lacks {", ".join(missing)}')
                else:
                    self.add('value-invalid', f'{part}[{i}]{explain(entry, error)}')
        return converted


def read(split: Split, optional: Tuple[str, ...] = ()) -> Optional[Coco]:
    """Read an annotation file in the same way as pycocotools. If this fails, report it and return None.

    Args:
        split: Data set of the file.
        optional: Lists that the file may lack.
    """
    text = split.read_text()
    if text is None:
        return None
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f'not an object of lists, but {reprlib.repr(content)}')
        content = {**{part: [] for part in optional}, **content}
        lacking = [repr(part) for part in PARTS if not isinstance(content.get(part), list)]
        if lacking:
            raise ValueError(f'no list {" and no list ".join(lacking)}')
    except (ValueError, RecursionError) as error:
        split.add('annotations-unreadable', f'{split.dataset.ann_file}: {error}')
        return None
    return Coco(split, content)


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


def mask_problem(annotation: Annotation, image: Image) -> Optional[str]:
    """Describe what is wrong with the segmentation of an annotation with a box, or return None."""
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
    x, y, width, height = box_of(annotation)
    if left > x + width or top > y + height or right < x or bottom < y:
        span = f'[{left:g}, {top:g}, {right - left:g}, {bottom - top:g}]'
        return f'the polygons span {span}, apart from the box {annotation.bbox}'
    return None


def _run_problem(mask: RunLengths, shape: Tuple[float, float]) -> Optional[str]:
    if mask.size != shape:
        return f'RLE of size {list(mask.size)}, but the image has {list(shape)}'
    counts = _decode_counts(mask.counts) if isinstance(mask.counts, str) else mask.counts
    if counts is None:
        return f'RLE counts {reprlib.repr(mask.counts)} cannot be decoded'
    pixels = int(shape[0] * shape[1])
    if sum(counts) != pixels:
        return f'RLE counts of {sum(counts)} pixels, but the image has {pixels}'
    return None if sum(counts[1::2]) else 'RLE without a pixel of the object'


def _decode_counts(text: str) -> Optional[List[int]]:
    """Decode COCO's compressed RLE; None if it is damaged. pycocotools reads beyond its end then.

    Each character holds five bits, and a bit that says whether more follow. From the fourth
    number on, the text holds differences to the last number but one.
    """
    if not re.fullmatch('([P-o]{0,6}[0-O])*', text):
        return None
    counts: List[int] = []
    for number in re.findall('[P-o]*[0-O]', text):
        bits = [ord(character) - 48 for character in number]
        value = sum((five & 31) << 5 * i for i, five in enumerate(bits))
        value -= (bits[-1] & 16) << 5 * len(bits) - 4  # the sign
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts if min(counts, default=0) >= 0 else None
