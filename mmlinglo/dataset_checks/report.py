# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The kinds of findings and how they are reported."""

from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple


class Check(NamedTuple):
    """A kind of finding.

    ``error``: training or evaluation fails, or learns or measures something
    else than meant. ``warning``: data is left out, or looks unusual.
    """

    severity: str
    problem: str
    remedy: str


CHECKS: Dict[str, Check] = {
    # the config
    'variable-unused': Check(
        'error',
        'a variable of the config does not reach the data sets',
        'a variable that a child config or --cfg-options changes is not evaluated again in the '
        'base config: set it in a copy of the file that derives settings from it',
    ),
    'dataset-unbuildable': Check(
        'error', 'the data set cannot be opened', 'change what the message names'
    ),
    'dataset-unknown': Check(
        'warning',
        'annotations of this type of data set are not checked, only its pictures',
        'look at some samples with the browse_dataset tool of the toolbox',
    ),
    'classes-text': Check(
        'error',
        'the classes are one text, whose letters would be taken for classes',
        "write a tuple, with a comma also after a single name: classes=('cat',)",
    ),
    'classes-differ': Check(
        'error',
        'the classes of training and evaluation differ',
        'use one variable for metainfo.classes of all data sets',
    ),
    'palette-short': Check(
        'error',
        'there are fewer colours than classes, so that drawing fails',
        'drop metainfo.palette or give one colour for each class',
    ),
    'num-classes': Check(
        'error',
        'the model has another number of classes than the data set',
        'set num_classes to the number of classes, everywhere that it occurs',
    ),
    'topk': Check(
        'error', 'top-k of more classes than there are', 'use topk=(1,) in the evaluator and head'
    ),
    'evaluator-file': Check(
        'error',
        'the evaluator reads another annotation file than the data set',
        'set ann_file of the evaluator to the file of its data set',
    ),
    'same-data': Check(
        'warning',
        'training and evaluation read the same data',
        'keep pictures apart that training does not see',
    ),
    'no-samples': Check(
        'error',
        'nothing is left to train or evaluate on',
        'mend the findings below, or filter_cfg and drop_last of the data loader',
    ),
    # files
    'folder-missing': Check(
        'error', 'a folder does not exist', 'set data_root, data_prefix and the folders right'
    ),
    'annotations-missing': Check(
        'error', 'an annotation file does not exist', 'set data_root and ann_file right'
    ),
    'annotations-unreadable': Check(
        'error',
        'an annotation file cannot be read',
        'write the file anew in the format that the data set expects',
    ),
    'pictures-none': Check(
        'error',
        'no pictures found',
        'set data_root, data_prefix and the suffix (img_suffix, extensions) right',
    ),
    'picture-missing': Check(
        'error', 'a picture does not exist', 'add the picture or drop its annotation'
    ),
    'picture-unreadable': Check(
        'error', 'a picture cannot be read', 'replace the picture or drop its annotation'
    ),
    'picture-truncated': Check(
        'error',
        'a picture ends too early; training fails, or sees grey where data is missing',
        'copy the picture again from its source or drop its annotation',
    ),
    'picture-size': Check(
        'error',
        'the size of a picture differs from that in the annotation file, so that boxes are '
        'misplaced',
        'annotate the picture as it is; if it has an EXIF orientation, save it upright',
    ),
    'picture-suffix': Check(
        'warning',
        'pictures are left out because of their suffix',
        'convert them to JPEG or PNG, or change the suffix (img_suffix, extensions)',
    ),
    # boxes in COCO format
    'class-missing': Check(
        'error',
        'a class of the config is not in the annotation file: it gets no boxes, and the labels '
        'of the classes after it shift',
        'spell metainfo.classes as the names of the categories, letter by letter',
    ),
    'class-order': Check(
        'error',
        'the classes are in another order than the categories; labels follow the file, so that '
        'predictions get wrong names',
        'write metainfo.classes in the order of the categories in the file',
    ),
    'categories-differ': Check(
        'error',
        'the annotation files list their categories differently, so that labels differ',
        'write the same list of categories, in one order, into all files',
    ),
    'category-ignored': Check(
        'warning',
        'a category of the annotation file is not among the classes; its boxes are left out',
        'add it to metainfo.classes if it is to be found',
    ),
    'category-duplicate': Check(
        'error', 'categories share an id or a name', 'give each category one id and one name'
    ),
    'image-duplicate': Check(
        'error', 'entries of `images` share an id', 'number the pictures without repetition'
    ),
    'file-duplicate': Check(
        'warning',
        'entries of `images` share a file: it counts several times',
        'merge the entries and point their annotations to the one that stays',
    ),
    'annotation-duplicate': Check(
        'error', 'annotations share an id', 'number the annotations without repetition'
    ),
    'annotation-incomplete': Check(
        'error',
        'an entry lacks a key that mmdet or the COCO evaluation needs',
        'write images with id, file_name, width, height and annotations with id, image_id, '
        'category_id, bbox, area, iscrowd',
    ),
    'annotation-image': Check(
        'error',
        'an annotation belongs to a picture that is not in the file; it is left out',
        'set its image_id to the id of an entry of `images`',
    ),
    'annotation-category': Check(
        'error',
        'an annotation has a category that is not in the file; it is left out',
        'set its category_id to the id of an entry of `categories`',
    ),
    'box-invalid': Check(
        'error', 'a box is not four finite numbers', 'write [x, y, width, height] in pixels'
    ),
    'box-relative': Check(
        'error',
        'boxes look like fractions of the picture',
        'write [x, y, width, height] in pixels',
    ),
    'box-corners': Check(
        'error',
        'boxes look like corners [x1, y1, x2, y2]',
        'write [x, y, width, height] in pixels',
    ),
    'box-empty': Check(
        'error',
        'a box without width, height or area; mmdet leaves it out of training',
        'mend or drop the annotation',
    ),
    'box-outside': Check(
        'error',
        'a box lies outside its picture; mmdet leaves it out of training',
        'mend or drop the annotation; if there are many, see whether width and height of the '
        'picture are swapped',
    ),
    'box-small': Check(
        'warning',
        'a box is narrower than one pixel; mmdet leaves it out of training',
        'drop the annotation',
    ),
    'box-sticks-out': Check(
        'warning',
        'a box sticks out of its picture by more than a pixel',
        'cut the box at the border of the picture',
    ),
    'boxes-none': Check(
        'warning',
        'a picture has no boxes',
        'annotate it, unless it is meant to be empty; training leaves it out while '
        'filter_cfg.filter_empty_gt is True',
    ),
    'picture-filtered': Check(
        'warning',
        'a picture is smaller than filter_cfg.min_size and left out of training',
        'lower filter_cfg.min_size',
    ),
    'mask-missing': Check(
        'error',
        'the pipeline loads masks, but an annotation has no segmentation',
        'add polygons or RLE as `segmentation`, or use a detector without masks',
    ),
    'class-unseen': Check(
        'warning',
        'a class never occurs in the training data that was opened',
        'add examples or drop the class',
    ),
    # label images
    'label-missing': Check(
        'error',
        'a picture has no label image',
        'give the label image the name of the picture with seg_map_suffix, or drop the picture',
    ),
    'label-unused': Check(
        'warning', 'a label image has no picture', 'add the picture, or set img_suffix right'
    ),
    'label-unreadable': Check(
        'error', 'a label image cannot be read', 'write the label image anew'
    ),
    'label-colours': Check(
        'error',
        'a label image has several channels',
        'convert the colours to class numbers, in a PNG of one channel or with a palette',
    ),
    'label-size': Check(
        'error',
        'a label image and its picture differ in size',
        'write both in one size; if the picture has an EXIF orientation, save it upright',
    ),
    'label-range': Check(
        'error',
        'label images hold numbers that are no class',
        'set classes, reduce_zero_label and ignore_index to what the label images hold',
    ),
    'label-binary': Check(
        'error',
        'label images hold no numbers but 0 and 255, and 255 is ignored: one class at most is '
        'learnt',
        'write 1 in place of 255',
    ),
    'zero-label-kept': Check(
        'error',
        'a label equals the number of classes: 0 may mean unlabelled, but counts as the '
        'first class',
        'set reduce_zero_label=True; if 0 is a class, add a name for the last label to the '
        'classes, or make it the ignore_index',
    ),
    'zero-label-dropped': Check(
        'error',
        'reduce_zero_label=True drops label 0, but labels run from 0 to the number of classes '
        'less one: 0 seems to be a class and all others shift',
        'set reduce_zero_label=False; or, if 0 means unlabelled, add examples of the last class',
    ),
    'zero-label-differs': Check(
        'error',
        'reduce_zero_label differs between places of the config',
        'use one variable for all data sets; LoadAnnotations needs none, it follows the data set',
    ),
    'ignore-index': Check(
        'error',
        'the ignored label differs between places of the config',
        'use one variable for decode_head.ignore_index, the evaluator, and seg_pad_val',
    ),
    'labels-none': Check(
        'warning',
        'every pixel of a label image is ignored',
        'label the picture or drop it',
    ),
    # class folders
    'folder-flat': Check(
        'error',
        'pictures lie in one folder, without a folder for each class',
        'move each picture into a folder with the name of its class, or name their classes in '
        'an annotation file (ann_file)',
    ),
    'folder-hidden': Check(
        'error', 'a hidden folder counts as a class', 'delete the folder, or move it elsewhere'
    ),
    'folders-differ': Check(
        'error',
        'training and evaluation have different class folders, so that labels differ',
        'make the same class folders for both, also where one has no pictures',
    ),
    'folder-count': Check(
        'error',
        'there are more or fewer class folders than classes',
        'give the classes the names of the folders',
    ),
    'folder-order': Check(
        'error',
        'classes and folders are in different orders; labels follow the sorted folders, so that '
        'predictions get wrong names',
        'sort metainfo.classes',
    ),
    'folder-name': Check(
        'warning',
        'classes and folders have different names; the first sorted folder gets the first name',
        'give the classes the names of the folders, or see that the order is right',
    ),
    'folder-empty': Check('warning', 'a class folder holds no pictures', 'add pictures'),
    'file-stray': Check(
        'warning',
        'pictures lie beside the class folders and are left out',
        'move them into the folder of their class',
    ),
    'line-invalid': Check(
        'error',
        'a line of the annotation file is not a picture and a class number',
        'write one picture a line: its path, a space, and the number of its class',
    ),
    'class-number': Check(
        'error',
        'a class number is out of range',
        'number the classes from 0 to their number less one',
    ),
}


@dataclass
class Finding:
    """All places where one kind of defect was found in one data set.

    Attributes:
        check: Key of :data:`CHECKS`.
        dataset: ``train``, ``val``, ``test`` or several of them; ``config``.
        places: What was found where, one text each.
    """

    check: str
    dataset: str
    places: List[str] = field(default_factory=list)

    @property
    def severity(self) -> str:
        return CHECKS[self.check].severity


class Report:
    """Findings, grouped, and what was looked at."""

    def __init__(self) -> None:
        self.datasets: Dict[str, dict] = {}
        self._findings: Dict[tuple, Finding] = {}

    def add(self, check: str, dataset: str, place: str) -> None:
        """Note a defect.

        Args:
            check: Key of :data:`CHECKS`.
            dataset: Name of the data set.
            place: File, entry and value.
        """
        key = (CHECKS[check].severity, list(CHECKS).index(check), dataset)
        self._findings.setdefault(key, Finding(check, dataset)).places.append(place)

    @property
    def findings(self) -> List[Finding]:
        """Errors first, each kind in the order of :data:`CHECKS`."""
        return [self._findings[key] for key in sorted(self._findings)]

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def format(self, num_places: int = 3) -> str:
        """Text for a terminal.

        Args:
            num_places: Places to print for each finding.
        """
        lines = []
        for name, facts in self.datasets.items():
            keys = [key for key in ('pictures', 'opened', 'boxes', 'classes') if key in facts]
            numbers = [f'{facts[key]} {key}' for key in keys]
            lines.append(f'{name}: ' + ', '.join([facts['type'], *numbers]))
        for finding in self.findings:
            check, more = CHECKS[finding.check], len(finding.places) - num_places
            times = f', {len(finding.places)} times' if len(finding.places) > 1 else ''
            lines += [
                '',
                f'{check.severity} in {finding.dataset}{times}: {check.problem} [{finding.check}]',
                *(f'    {place}' for place in finding.places[:num_places]),
                *([f'    and {more} more'] if more > 0 else []),
                f'  remedy: {check.remedy}',
            ]
        counts = [
            f'{count} {severity}' + 's' * (count != 1)
            for severity, count in ((s, self.count(s)) for s in ('error', 'warning'))
            if count
        ]
        return '\n'.join([*lines, '', ', '.join(counts) or 'no findings'])

    def as_dict(self) -> dict:
        """Everything, for JSON; here with all places."""
        findings = [
            dict(
                check=finding.check,
                dataset=finding.dataset,
                count=len(finding.places),
                places=finding.places,
                **CHECKS[finding.check]._asdict(),
            )
            for finding in self.findings
        ]
        return dict(
            datasets=self.datasets,
            errors=self.count('error'),
            warnings=self.count('warning'),
            findings=findings,
        )
