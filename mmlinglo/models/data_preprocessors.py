# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The toolboxes' data preprocessors, which also tell the backbone how large the images were.

For ``LinGlo(mask_padding=True)``. They take the arguments of the toolboxes' own. Detectors
and segmentors hand the batch to their backbone as it is, without the data samples, so the
sizes are an attribute of that tensor. Where a model makes another tensor of it, as mmseg's
sliding windows do, the backbone misses them and says so.
"""

from typing import Any

from mmengine.model import BaseDataPreprocessor

from mmlinglo.registry import MODELS

IMAGE_SIZES = 'image_sizes'


@MODELS.register_module(name='SizedDetDataPreprocessor')
def build_sized_det_data_preprocessor(**kwargs: Any) -> BaseDataPreprocessor:
    """mmdet's ``DetDataPreprocessor`` with the images' sizes."""
    from mmdet.models import DetDataPreprocessor  # needed here only

    return _with_image_sizes(DetDataPreprocessor(**kwargs))


@MODELS.register_module(name='SizedSegDataPreProcessor')
def build_sized_seg_data_preprocessor(**kwargs: Any) -> BaseDataPreprocessor:
    """mmseg's ``SegDataPreProcessor`` with the images' sizes."""
    from mmseg.models import SegDataPreProcessor  # needed here only

    return _with_image_sizes(SegDataPreProcessor(**kwargs))


def _with_image_sizes(preprocessor: BaseDataPreprocessor) -> BaseDataPreprocessor:
    preprocessor.register_forward_hook(_keep_image_sizes)
    return preprocessor


def _keep_image_sizes(_: BaseDataPreprocessor, __: tuple, batch: dict) -> None:
    if batch['data_samples'] is not None:
        sizes = [tuple(sample.img_shape[:2]) for sample in batch['data_samples']]
        setattr(batch['inputs'], IMAGE_SIZES, sizes)
