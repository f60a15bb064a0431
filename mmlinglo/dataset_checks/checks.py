# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The kinds of findings, and the report. docs/custom_dataset.md lists the kinds too, and a test compares both."""

from dataclasses import asdict, dataclass, field
from typing import Dict, List, NamedTuple, Tuple


class Check(NamedTuple):
    """A kind of finding.

    ``error``: training or evaluation fails, or learns or measures something other than you
    mean. ``warning``: data is left out, or looks unusual.
    """

    severity: str
    problem: str
    remedy: str


# One check per line, in the order of the report: key | severity | problem | remedy.
_TABLE = """
variable-unused | error | a variable of the config does not reach the data sets | a base config is not evaluated again when a child config or --cfg-options changes its variable: set the variable in a copy of the file that uses it
dataset-unbuildable | error | the data set cannot be opened | change what the message names
dataset-unknown | warning | annotations of this type of data set are not checked, only its images | look at some samples with the browse_dataset tool of the toolbox
data-prefix | error | data_prefix does not name the folder of the images | write data_prefix=dict(img='folder/') for boxes, dict(img_path='folder/', seg_map_path='labels/') for label images, dict(img_path='folder/') for class folders
classes-text | error | the classes are a single string, so that each letter would be a class | write a tuple, with a comma also after a single name: classes=('cat',)
classes-differ | error | training and evaluation have different classes | use one variable for metainfo.classes of all data sets
palette-short | error | there are fewer colours than classes, so that drawing fails | drop metainfo.palette or give one colour for each class
num-classes | error | the model has another number of classes than the data set | set num_classes (num_things_classes and num_stuff_classes in a panoptic head) to the number of classes, everywhere that it occurs
class-weight | error | class_weight has another length than the loss needs | write one weight per class; a softmax loss of mmdet needs one more, for the background
out-channels | error | out_channels of a decode head does not fit its classes and its loss | use out_channels=1 with two classes and loss_decode.use_sigmoid=True, or drop out_channels
topk | error | top-k asks for more classes than there are | use topk=(1,) in the evaluator and head
evaluator-file | error | the evaluator reads another annotation file than the data set | set ann_file of the evaluator to the file of its data set
same-data | warning | training and evaluation read the same data | set images aside that training does not see
no-samples | error | nothing is left to train or evaluate on | correct the findings below, or filter_cfg or indices of the data set, or batch_size and drop_last of the data loader
last-batch | error | a batch of one image at 32 x 32 pixels or less: batch normalization cannot train on a single value | set drop_last=True, another batch_size, or a larger input size
input-small | error | the images that the network gets in training are smaller than its backbone takes | set a larger input size (img_size, crop_size or scale)
batch-shapes | error | images of different sizes cannot form one evaluation batch in mmseg | set batch_size=1 in the data loader of the evaluation, or resize all images to one size
slide-window | error | the sliding window of model.test_cfg is not usable | write two numbers for crop_size and for stride, as in crop_size=(512, 512), stride=(341, 341), and no stride longer than the crop
slide-small | warning | images are smaller than the sliding window: mmseg does not pad them, so the network sees a size that it was not trained at | resize the images to at least crop_size in the test pipeline, or use test_cfg=dict(mode='whole')
folder-missing | error | a folder does not exist | correct data_root, data_prefix, or the names of the folders
annotations-missing | error | an annotation file does not exist | correct data_root and ann_file
annotations-unreadable | error | an annotation file cannot be read | save the file in the format that the data set expects, as UTF-8 without a byte-order mark: json.dump(content, open(path, 'w', encoding='utf-8'))
pictures-none | error | no images found | correct data_root, data_prefix, or the suffix (img_suffix, extensions)
picture-missing | error | an image does not exist | add the image or drop its annotation
picture-unreadable | error | an image cannot be read | replace the image or drop its annotation
picture-truncated | error | an image ends too early; training fails, or sees grey where data is missing | copy the image again from its source or drop its annotation
picture-size | error | the size of an image differs from that in the annotation file, so that boxes are misplaced | annotate the image as it is; if it has an EXIF orientation, save it upright
picture-suffix | warning | images are left out because of their suffix | convert them to JPEG or PNG, or change the suffix (img_suffix, extensions)
class-missing | error | a class of the config is not in the annotation file: it gets no boxes, and the labels of the classes after it shift | write metainfo.classes exactly as the names of the categories
class-order | error | the classes are in another order than the categories; labels follow the file, so that predictions get wrong names | write metainfo.classes in the order of the categories in the file
categories-differ | error | the annotation files list their categories differently, so that labels differ | write the same list of categories, in one order, into all files
category-ignored | warning | a category of the annotation file is not among the classes; its boxes are left out | add it to metainfo.classes if the model should find it
category-duplicate | error | categories share an id or a name | give each category one id and one name
image-duplicate | error | entries of `images` share an id | give each image its own id
file-duplicate | warning | entries of `images` share a file, so that it counts several times | merge the entries and point their annotations to the one that stays
annotation-duplicate | error | annotations share an id | give each annotation its own id
annotation-id | error | the COCO evaluation counts a match with annotation id 0 as none, and fails on ids that are text | number the annotations 1, 2, 3, ...
ids-mixed | error | some ids are text and others are numbers, which the COCO evaluation cannot sort | write all ids as numbers
annotation-incomplete | error | an entry lacks a key that mmdet or the COCO evaluation needs | write images with id, file_name, width, height and annotations with id, image_id, category_id, bbox, area, iscrowd
value-invalid | error | an entry holds a value of the wrong type or range | write ids, sizes, area and iscrowd as numbers, file_name and name as text
annotation-image | error | an annotation belongs to an image that is not in the file; it is left out | set its image_id to the id of an entry of `images`
annotation-category | error | an annotation has a category that is not in the file; it is left out | set its category_id to the id of an entry of `categories`
crowd-only | error | every box of a class has iscrowd=1: there is nothing to train on and nothing to evaluate | set iscrowd=0; 1 is for regions of many objects that are not annotated one by one
box-ignored | error | boxes have `ignore`: mmdet leaves them out, but the COCO evaluation counts them as missed | set iscrowd=1 instead of `ignore`, or drop these annotations
box-invalid | error | a box is not four finite numbers | write [x, y, width, height] in pixels
box-relative | error | boxes look like fractions of the image | write [x, y, width, height] in pixels
box-corners | error | boxes look like corners [x1, y1, x2, y2] | write [x, y, width, height] in pixels
box-empty | error | a box has no width, height or area; mmdet leaves it out, the COCO evaluation counts it as missed | correct or drop the annotation
box-outside | error | a box lies outside its image; mmdet leaves it out, the COCO evaluation counts it as missed | correct or drop the annotation; if there are many, see whether width and height of the image are swapped
box-small | warning | a box is narrower than one pixel; mmdet leaves it out, the COCO evaluation counts it as missed | drop the annotation
box-sticks-out | warning | a box sticks out of its image by more than a pixel | cut the box at the border of the image
box-duplicate | warning | several annotations of one class have the same box: the model cannot find them all | drop the copies
boxes-many | warning | an image has more boxes than the evaluation or the model counts, so that the recall cannot reach 1 | raise max_per_img in model.test_cfg; the COCO evaluation itself counts 100 boxes per image and class
boxes-none | warning | an image has no boxes | annotate it, unless it is meant to be empty; training leaves it out while filter_cfg.filter_empty_gt is True
picture-filtered | warning | an image is smaller than filter_cfg.min_size and left out of training | lower filter_cfg.min_size
mask-missing | error | the pipeline loads masks, but an annotation has no segmentation | add polygons or RLE as `segmentation`, or use a detector without masks
mask-invalid | error | a segmentation is neither polygons nor RLE of its image | write [[x1, y1, x2, y2, x3, y3, ...], ...] in pixels, or RLE dict(size=[height, width], counts=...) as pycocotools.mask makes it
class-unseen | warning | a class never occurs in the training data that was opened | add examples or drop the class
label-missing | error | an image has no label image | give the label image the name of the image with seg_map_suffix, or drop the image
label-unused | warning | a label image belongs to no image | add the image, or correct img_suffix
label-unreadable | error | a label image cannot be read | save the label image again
label-colours | error | a label image has several channels | convert the colours to class numbers, in a PNG of one channel or with a palette
label-size | error | an image and its label image differ in size | save both in one size; if the image has an EXIF orientation, save it upright
label-range | error | label images hold numbers that are not a class | make classes, reduce_zero_label and ignore_index fit the numbers in the label images
label-binary | error | label images hold only the numbers 0 and 255, and 255 is ignored: at most one class is learnt | write 1 in place of 255
zero-label-kept | error | a label equals the number of classes: 0 may mean unlabelled, but counts as the first class | set reduce_zero_label=True; if 0 is a class, add a name for the last label to the classes, or make it the ignore_index
zero-label-dropped | error | reduce_zero_label=True drops label 0, but labels run from 0 to the number of classes minus one: 0 seems to be a class and all others shift | set reduce_zero_label=False; or, if 0 means unlabelled, add examples of the last class
zero-label-differs | error | reduce_zero_label differs between places of the config | use one variable for all data sets; LoadAnnotations needs none, it follows the data set
ignore-index | error | the ignored label differs between places of the config | use one variable for decode_head.ignore_index, the evaluator, and seg_pad_val
labels-none | warning | every pixel of a label image is ignored | label the image or drop it
folder-flat | error | images lie in one folder, without a folder for each class | move each image into a folder with the name of its class, or name their classes in an annotation file (ann_file)
folder-hidden | error | a hidden folder counts as a class | delete the folder, or move it elsewhere
folders-differ | error | training and evaluation have different class folders, so that labels differ | make the same class folders for both, also where one has no images
folder-count | error | there are more or fewer class folders than classes | give the classes the names of the folders
folder-order | error | classes and folders are in different orders; labels follow the sorted folders, so that predictions get wrong names | sort metainfo.classes
folder-name | warning | classes and folders have different names; the first sorted folder gets the first name | give the classes the names of the folders, or see that the order is right
folder-empty | warning | a class folder holds no images | add images
file-stray | warning | images lie beside the class folders and are left out | move them into the folder of their class
line-invalid | error | a line of the annotation file is not an image and a class number | write one image per line: its path, a space, and the number of its class
class-number | error | a class number is out of range | number the classes from 0 to the number of classes minus one
"""
CHECKS: Dict[str, Check] = {
    key: Check(*texts) for key, *texts in (line.split(' | ') for line in _TABLE.split('\n') if line)
}


@dataclass
class Finding:
    """All places where one kind of defect was found in one data set.

    Attributes:
        check: Key of :data:`CHECKS`.
        dataset: ``train``, ``val``, ``test`` or several of them; ``config``.
        severity, problem, remedy: As in :class:`Check`.
        places: One text per place, with what was found there.
    """

    check: str
    dataset: str
    severity: str
    problem: str
    remedy: str
    places: List[str] = field(default_factory=list)


class Report:
    """Findings by kind, and the data sets that were checked."""

    def __init__(self) -> None:
        self.datasets: Dict[str, dict] = {}
        self._findings: Dict[Tuple[str, str], Finding] = {}

    def add(self, check: str, dataset: str, place: str) -> None:
        """Note a defect.

        Args:
            check: Key of :data:`CHECKS`.
            dataset: Name of the data set.
            place: File, entry and value.
        """
        finding = Finding(check, dataset, *CHECKS[check])
        self._findings.setdefault((check, dataset), finding).places.append(place)

    @property
    def findings(self) -> List[Finding]:
        """All findings, errors first, each kind in the order of :data:`CHECKS`."""
        ordered = [f for key in CHECKS for f in self._findings.values() if f.check == key]
        return sorted(ordered, key=lambda finding: finding.severity)

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def format(self, num_places: int = 3) -> str:
        """Format the report for a terminal, with so many places of each finding."""
        lines = []
        for name, facts in self.datasets.items():
            keys = [key for key in ('pictures', 'opened', 'boxes', 'classes') if key in facts]
            lines.append(
                ', '.join([f'{name}: {facts["type"]}', *(f'{facts[k]} {k}' for k in keys)])
            )
        for f in self.findings:
            count = len(f.places)
            times = f', {count} times' if count > 1 else ''
            lines += ['', f'{f.severity} in {f.dataset}{times}: {f.problem} [{f.check}]']
            lines += [f'    {place}' for place in f.places[:num_places]]
            lines += [f'    and {count - num_places} more'] * (count > num_places)
            lines += [f'  remedy: {f.remedy}']
        counts = [(self.count(severity), severity) for severity in ('error', 'warning')]
        summary = ', '.join(f'{count} {what}{"s" * (count > 1)}' for count, what in counts if count)
        return '\n'.join([*lines, '', summary or 'no findings'])

    def as_dict(self) -> dict:
        """Return the whole report, with all places, for JSON."""
        findings = [dict(asdict(each), count=len(each.places)) for each in self.findings]
        counts = dict(errors=self.count('error'), warnings=self.count('warning'))
        return dict(datasets=self.datasets, **counts, findings=findings)
