# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Class activation maps by a public package, against Grad-CAM's formula on the maps of a layer."""

import pytest
import torch
from conftest import TINY_ARCH, randomize_norms_
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from mmlinglo import LinGlo

HEIGHT, WIDTH, NUM_CLASSES = 64, 96, 5


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = LinGlo(TINY_ARCH, out_indices=3)
        self.fc = nn.Linear(TINY_ARCH['embed_dims'][-1], NUM_CLASSES)

    def forward(self, x):
        return self.fc(self.backbone(x)[0].mean((2, 3)))


def scale(x):
    """From 0 to 1, as the package does before and after it resizes."""
    x = x - x.min()
    return x / (1e-7 + x.max())


def to_channels_first(x):
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize('part', ['stages.2', 'stages.1.blocks.1', 'norm3'])
def test_grad_cam_with_a_reshape_transform(part):
    model = randomize_norms_(Classifier()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = model.backbone.get_submodule(part)
    image = torch.randn(1, 3, HEIGHT, WIDTH)
    cam = GradCAM(model, [layer], reshape_transform=to_channels_first)
    found = [cam(image, [ClassifierOutputTarget(label)])[0] for label in range(NUM_CLASSES)]

    maps = []
    layer.register_forward_hook(lambda _module, _args, out: maps.append(out))
    logits = model(image)[0]
    visible = 0
    for label in range(NUM_CLASSES):
        (gradient,) = torch.autograd.grad(logits[label], maps[0], retain_graph=True)
        weights = gradient.mean((1, 2))  # over the positions of (B, H, W, C)
        expected = torch.einsum('bhwc,bc->bhw', maps[0], weights).relu().detach()
        visible += int(expected.max() > 0)
        size = (HEIGHT, WIDTH)
        expected = nn.functional.interpolate(scale(expected)[None], size, mode='bilinear')[0, 0]
        # the package resizes by OpenCV
        torch.testing.assert_close(
            torch.from_numpy(found[label]), scale(expected), rtol=0, atol=0.02
        )
    assert visible > 0


def test_without_it_the_map_is_another():
    """What the FAQ warns of: the package takes the rows of (B, H, W, C) for channels, and says nothing."""
    model = randomize_norms_(Classifier()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer, image = model.backbone.stages[1], torch.randn(1, 3, HEIGHT, WIDTH)
    for label in range(NUM_CLASSES):
        targets = [ClassifierOutputTarget(label)]
        right = GradCAM(model, [layer], reshape_transform=to_channels_first)(image, targets)
        wrong = GradCAM(model, [layer])(image, targets)
        assert right.shape == wrong.shape
        assert abs(right - wrong).max() > 0.2
