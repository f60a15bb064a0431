# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Every config loads, builds and takes a loss step; the paper's recipes have the paper's values."""

import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmlinglo.utils.deploy import build_model

CONFIGS = sorted(p for p in (ROOT / 'configs').rglob('*.py') if '_base_' not in p.parts)
PEERS = ('pvtv2', 'resnet18')  # of the CIFAR-10 comparison
SIZES = ('b0', 'b1', 'b2')
EMBED_DIMS = dict(b0=[32, 64, 160, 256], b1=[64, 128, 320, 512], b2=[64, 128, 320, 512])


def config_id(path: Path) -> str:
    return path.stem


def load(task: str, size: str) -> Config:
    name = {
        'imagenet': f'linglo-{size}_8xb128_in1k',
        'coco': f'retinanet_linglo-{size}_fpn_1x_coco',
        'ade20k': f'fpn_linglo-{size}_8xb4-40k_ade20k-512x512',
    }[task]
    return Config.fromfile(ROOT / 'configs' / task / f'{name}.py')


def inputs_for(cfg: Config, model, size: int = 64) -> dict:
    """A batch of two images with labels, as the data preprocessor gets it."""
    images = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(2)]
    shape = dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0))
    if cfg.default_scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        samples = [DataSample(metainfo=shape).set_gt_label(i) for i in range(2)]
        return dict(inputs=torch.stack(images), data_samples=samples)
    if cfg.default_scope == 'mmdet':
        from mmdet.structures import DetDataSample

        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
        samples = []
        for i in range(2):
            sample = DetDataSample(metainfo={**shape, 'pad_shape': (size, size)})
            sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([i]))
            samples.append(sample)
        return dict(inputs=images, data_samples=samples)
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=shape)
        labels = torch.randint(0, model.decode_head.num_classes, (1, size, size))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


@pytest.mark.parametrize('path', CONFIGS, ids=config_id)
def test_builds_and_takes_a_loss_step(path):
    cfg = Config.fromfile(path)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 64)
    model = build_model(cfg).train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    if cfg.default_scope != 'mmpretrain':
        neck = cfg.model.neck
        assert neck.in_channels == [
            model.backbone.arch['embed_dims'][i] for i in model.backbone.out_indices
        ]
    data = model.data_preprocessor(inputs_for(cfg, model), training=True)
    losses = model(**data, mode='loss')
    loss, _ = model.parse_losses(losses)
    assert loss.isfinite()
    optim_wrapper.backward(loss)
    # DDP runs with find_unused_parameters=False
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    optim_wrapper.step()
    model.eval()
    with torch.no_grad():
        data = model.data_preprocessor(inputs_for(cfg, model), training=False)
        assert len(model(**data, mode='predict')) == 2


@pytest.mark.parametrize('path', CONFIGS, ids=config_id)
def test_common_settings(path):
    cfg = Config.fromfile(path)
    assert cfg.sync_bn == 'torch'
    assert cfg.auto_scale_lr.base_batch_size > 0
    assert cfg.auto_scale_lr.enable is False
    if path.stem.startswith(PEERS):
        return
    assert cfg.model.backbone.type == 'mmlinglo.LinGlo'
    arch = cfg.model.backbone.arch
    assert isinstance(arch, dict) or arch in cfg.filename


def test_names_are_unique():
    """mim looks configs up by their base name."""
    assert len({p.name for p in CONFIGS}) == len(CONFIGS)


@pytest.mark.parametrize('size', SIZES)
def test_imagenet_recipe(size):
    """NOTES section 4, column ImageNet-1K, item by item."""
    cfg = load('imagenet', size)
    assert cfg.default_scope == 'mmpretrain'
    model = cfg.model
    assert model.backbone == dict(
        type='mmlinglo.LinGlo', arch=size, out_indices=(3,), drop_path_rate=0.1
    )
    assert model.head.in_channels == EMBED_DIMS[size][-1]
    assert model.head.num_classes == 1000
    assert model.head.loss == dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    assert model.train_cfg.augments == [
        dict(type='Mixup', alpha=0.8),
        dict(type='CutMix', alpha=1.0),
    ]
    optim = cfg.optim_wrapper
    assert optim.optimizer == dict(
        type='AdamW', lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8
    )
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.train_dataloader.sampler == dict(
        type='RepeatAugSampler', num_repeats=3, shuffle=True
    )
    assert cfg.train_dataloader.collate_fn == dict(type='default_collate')
    pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert list(pipeline) == [
        'LoadImageFromFile',
        'RandomResizedCrop',
        'RandomFlip',
        'RandAugment',
        'RandomErasing',
        'PackInputs',
    ]
    assert pipeline['RandomResizedCrop'].scale == 224
    assert pipeline['RandomErasing'].erase_prob == 0.25
    assert pipeline['RandAugment'].magnitude_level == 9
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert (test['ResizeEdge'].scale, test['ResizeEdge'].edge) == (256, 'short')
    assert test['CenterCrop'].crop_size == 224
    assert cfg.train_cfg.max_epochs == 300


def test_imagenet_weight_decay_spares_norms_and_biases():
    cfg = load('imagenet', 'b0')
    model = build_model(cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decayed, spared = set(), set()
    for group in groups:
        for parameter in group['params']:
            (decayed if group['weight_decay'] else spared).add(names[id(parameter)])
    norms = {
        f'{prefix}.{name}'
        for prefix, module in model.named_modules()
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d))
        for name, _ in module.named_parameters()
    }
    assert norms
    assert spared == norms | {name for name in names.values() if name.endswith('.bias')}
    assert decayed | spared == set(names.values())


ABLATIONS = {
    'linglo-b0': {},
    'linglo-b0-cchh': dict(layout='C-C-H-H'),
    'linglo-b0-chhh': dict(layout='C-H-H-H'),
    'linglo-b0-cpe': dict(pos_encoding='CPE'),
    'linglo-b0-r-cpe': dict(pos_encoding='R-CPE'),
    'linglo-b0-p-cpe': dict(pos_encoding='P-CPE'),
    'linglo-b0-dot-product': dict(attention='dot_product'),
    'linglo-b0-wo-c': dict(overlap=False, pos_encoding='absolute'),
    'linglo-b0-wo-ch': dict(
        overlap=False,
        pos_encoding='absolute',
        arch=dict(
            embed_dims=(150,) * 4,
            depths=(2, 3, 3, 2),
            num_heads=(3,) * 4,
            mlp_ratio=(8, 8, 4, 4),
            strides=(16, 1, 1, 1),
        ),
    ),
}


@pytest.mark.parametrize('name', ABLATIONS)
def test_ablations(name):
    """Each row is the recipe of b0 with 100 epochs and what its name says, nothing else."""
    recipe = load('imagenet', 'b0')
    cfg = Config.fromfile(ROOT / f'configs/ablations/{name}_8xb128-100e_in1k.py')
    assert cfg.model.backbone == {**recipe.model.backbone, **ABLATIONS[name]}
    assert cfg.model.head.in_channels == (150 if name == 'linglo-b0-wo-ch' else 256)
    absolute = cfg.model.backbone.get('pos_encoding') == 'absolute'
    paramwise = {} if not absolute else dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0)))
    recipe.optim_wrapper.paramwise_cfg.update(paramwise)
    for key in ('optim_wrapper', 'train_dataloader', 'val_dataloader', 'auto_scale_lr', 'sync_bn'):
        assert cfg[key] == recipe[key], key
    assert cfg.train_cfg.max_epochs == 100
    warmup, cosine = cfg.param_scheduler
    assert (warmup.type, warmup.begin, warmup.end) == ('LinearLR', 0, 3)
    assert (cosine.type, cosine.begin, cosine.end, cosine.T_max) == (
        'CosineAnnealingLR',
        3,
        100,
        97,
    )


def test_each_ablation_has_a_config():
    files = {p.name for p in (ROOT / 'configs/ablations').glob('*.py')}
    assert files == {f'{name}_8xb128-100e_in1k.py' for name in ABLATIONS}


def learning_rates(cfg: Config, steps: int, epoch_length: int) -> list:
    """Learning rate at each step, by the Runner's own scheduler."""
    runner = Runner.__new__(Runner)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.optim_wrapper.optimizer.lr)
    runner._train_loop = type(
        'Loop', (), dict(max_epochs=cfg.train_cfg.get('max_epochs'), dataloader=[0] * epoch_length)
    )()
    runner.optim_wrapper = type('Wrapper', (), dict(optimizer=optimizer))()
    from mmengine.registry import PARAM_SCHEDULERS

    schedulers = [
        PARAM_SCHEDULERS.build(
            dict(config), default_args=dict(optimizer=optimizer, epoch_length=epoch_length)
        )
        for config in cfg.param_scheduler
    ]
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (step + 1) % epoch_length == 0:
                scheduler.step()
    return rates


def test_imagenet_schedule():
    rates = learning_rates(load('imagenet', 'b0'), steps=3000, epoch_length=10)
    assert rates[0] == pytest.approx(1e-6)
    assert rates[25] == pytest.approx(1e-3 * 25 / 50, rel=0.05)  # half of the linear warm-up
    assert max(rates) == pytest.approx(1e-3)
    for step in (500, 1525, 2500):
        cosine = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * (step - 50) / 2950)) / 2
        assert rates[step] == pytest.approx(cosine, rel=0.02)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)


@pytest.mark.parametrize('size', SIZES)
def test_coco_recipe(size):
    """NOTES section 4, column COCO."""
    cfg = load('coco', size)
    assert cfg.default_scope == 'mmdet'
    assert cfg.model.type == 'RetinaNet'
    backbone = cfg.model.backbone
    assert backbone.out_indices == (1, 2, 3)
    assert backbone.drop_path_rate == 0.1
    assert backbone.init_cfg == dict(
        type='Pretrained',
        checkpoint=f'work_dirs/linglo-{size}_8xb128_in1k/epoch_300.pth',
        prefix='backbone.',
    )
    neck = cfg.model.neck
    assert neck.in_channels == EMBED_DIMS[size][1:]
    assert (neck.out_channels, neck.num_outs, neck.add_extra_convs) == (256, 5, 'on_input')
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_cfg.max_epochs == 12
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        resize = next(s for s in loader.dataset.pipeline if s.type == 'Resize')
        assert (resize.scale, resize.keep_ratio) == ((1333, 800), True)
    steps = [s.type for s in cfg.train_dataloader.dataset.pipeline]
    assert steps == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'Resize',
        'RandomFlip',
        'PackDetInputs',
    ]


def test_coco_schedule():
    rates = learning_rates(load('coco', 'b0'), steps=1200, epoch_length=100)
    assert rates[600] == pytest.approx(1e-4)
    assert rates[850] == pytest.approx(1e-5)
    assert rates[1150] == pytest.approx(1e-6)


def test_coco_matches_mmdet_where_the_paper_says_so():
    """Anchors, losses, assigner and test settings are `retinanet_r50_fpn`'s."""
    import mmdet

    base = Path(mmdet.__file__).parent / '.mim/configs/_base_/models/retinanet_r50_fpn.py'
    theirs, ours = Config.fromfile(base).model, load('coco', 'b0').model
    del ours.bbox_head['init_cfg']
    for key in ('bbox_head', 'train_cfg', 'test_cfg', 'data_preprocessor'):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize('size', SIZES)
def test_ade20k_recipe(size):
    """NOTES section 4, column ADE20K."""
    cfg = load('ade20k', size)
    assert cfg.default_scope == 'mmseg'
    backbone = cfg.model.backbone
    assert backbone.out_indices == (0, 1, 2, 3)
    assert backbone.drop_path_rate == 0.1
    assert backbone.init_cfg.checkpoint == f'work_dirs/linglo-{size}_8xb128_in1k/epoch_300.pth'
    assert cfg.model.neck.in_channels == EMBED_DIMS[size]
    assert cfg.model.decode_head.type == 'FPNHead'
    assert cfg.model.decode_head.num_classes == 150
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 32
    assert cfg.train_cfg.max_iters == 40000
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert train['RandomResize'] == dict(
        type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True
    )
    assert train['RandomCrop'].crop_size == (512, 512)
    assert {'RandomFlip', 'PhotoMetricDistortion'} <= set(train)
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert test['Resize'] == dict(type='Resize', scale=(2048, 512), keep_ratio=True)
    assert test['ResizeToMultiple'].size_divisor == 32


def test_ade20k_schedule():
    rates = learning_rates(load('ade20k', 'b0'), steps=40000, epoch_length=40000)
    for step in (0, 10000, 39000):
        assert rates[step] == pytest.approx(1e-4 * (1 - step / 40000) ** 0.9, rel=1e-3)


@pytest.mark.parametrize('task', ['coco', 'ade20k'])
def test_new_layers_start_from_xavier(task):
    cfg = load(task, 'b0')
    cfg.model.backbone.init_cfg = None
    model = build_model(cfg)
    model.init_weights()
    modules = (model.neck, model.bbox_head if task == 'coco' else model.decode_head)
    for module in modules:
        for name, conv in module.named_modules():
            if isinstance(conv, torch.nn.Conv2d):
                fan_out, fan_in = conv.weight.shape[0], conv.weight.shape[1]
                receptive = conv.kernel_size[0] * conv.kernel_size[1]
                bound = math.sqrt(6 / ((fan_in + fan_out) * receptive))
                assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.02), name
    if task == 'coco':
        prior = torch.sigmoid(model.bbox_head.retina_cls.bias)
        torch.testing.assert_close(prior, torch.full_like(prior, 0.01))
