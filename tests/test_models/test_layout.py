"""Compiled operators of mmcv read maps as contiguous ones, whatever their strides."""

import pytest
import torch

from mmlinglo import LinGlo

TINY = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratio=(2, 2))


@pytest.mark.parametrize('size', [(64, 96), (33, 47)])
@pytest.mark.parametrize('form', ['training', 'evaluation', 'deployed'])
def test_roi_align_reads_the_maps_that_the_backbone_returns(form, size):
    ops = pytest.importorskip('mmcv.ops')
    model = LinGlo(TINY, out_indices=(0, 1)).train(form == 'training')
    if form == 'deployed':
        model.switch_to_deploy()
    boxes = torch.tensor([[0.0, 2.0, 3.0, 30.0, 28.0], [1.0, 5.0, 1.0, 20.0, 31.0]])
    for feature_map, stride in zip(model(torch.randn(2, 3, *size)), (4, 8)):
        fresh = torch.empty(feature_map.shape).copy_(feature_map)
        align = ops.RoIAlign(output_size=3, spatial_scale=1 / stride)
        torch.testing.assert_close(align(feature_map, boxes), align(fresh, boxes), rtol=0, atol=0)


def test_maps_have_the_strides_of_contiguous_ones_down_to_one_position():
    for feature_map in LinGlo(TINY, out_indices=(0, 1)).eval()(torch.randn(2, 3, 32, 32)):
        assert feature_map.stride() == torch.empty(feature_map.shape).stride()


def test_channels_last_keeps_the_layout_and_the_values():
    model = LinGlo(TINY, out_indices=(0, 1)).eval()
    images = torch.randn(2, 3, 64, 96)
    expected = model(images)
    model.channels_last = True
    for feature_map, contiguous in zip(model(images), expected):
        assert feature_map.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(feature_map, contiguous, rtol=0, atol=0)
