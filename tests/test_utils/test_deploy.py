# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from torch import nn

from mmlinglo.utils.deploy import build_model, relative_difference, switch_to_deploy


class Model(nn.Module):
    """Outputs nested as those of the toolboxes are: a tensor of maps and a list of one."""

    def __init__(self, first, second):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([first, second]))

    def forward(self, images, mode):
        assert mode == 'tensor'
        assert images.dtype == self.scale.dtype == torch.float64
        assert images.shape == (2, 3, 16, 16)
        return images * self.scale[0], [100 * images * self.scale[1]]


@pytest.mark.parametrize(
    ('other', 'expected'),
    [((1.0, 1.0), 0.0), ((1.25, 1.0), 0.25), ((1.0, 0.5), 0.5), ((1.25, 0.5), 0.5)],
)
def test_relative_difference(other, expected):
    first, second = Model(1.0, 1.0), Model(*other)
    assert relative_difference(first, second, image_size=16) == pytest.approx(expected)
    assert first.scale.dtype == second.scale.dtype == torch.float32
    assert not any(p.requires_grad is False for p in first.parameters())


def test_outputs_of_zeros():
    assert relative_difference(Model(0.0, 0.0), Model(0.0, 0.0), image_size=16) == 0


def test_every_part_is_switched():
    class Part(nn.Module):
        deployed = 0

        def switch_to_deploy(self):
            self.deployed += 1

    model = nn.Sequential(Part(), nn.Sequential(nn.Linear(1, 1), Part()))
    switch_to_deploy(model)
    assert (model[0].deployed, model[1][1].deployed) == (1, 1)


@pytest.mark.parametrize('where', ['beside the model', 'inside'])
def test_models_get_their_preprocessing_and_configs_stay_as_they_are(where):
    cfg = Config.fromfile(ROOT / 'configs/quickstart/linglo-b0_2xb16-8e_shapes.py')
    wanted = dict(type='ClsDataPreprocessor', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    cfg.data_preprocessor = wanted
    if where == 'inside':
        cfg.data_preprocessor = dict(wanted, mean=[7.0, 7.0, 7.0])
        cfg.model.data_preprocessor = wanted
    before = copy.deepcopy(cfg.to_dict())
    model = build_model(cfg)
    assert model.data_preprocessor.mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert model.data_preprocessor.std.flatten().tolist() == [4.0, 5.0, 6.0]
    assert cfg.to_dict() == before
