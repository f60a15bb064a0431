# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Every config loads, builds, takes a loss step and predicts; recipes have the values of their sources."""

import math
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARCH
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmlinglo import LinGlo
from mmlinglo.utils.cli import load_config
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


def leaf(name: str) -> Config:
    return Config.fromfile(next(path for path in CONFIGS if path.stem == name))


def toolbox_config(package: str, path: str) -> Config:
    """A config that the installed toolbox ships, without `backend_args`."""
    folder = Path(import_module(package).__file__).parent / '.mim/configs'
    return without_backend_args(Config.fromfile(folder / path))


def without_backend_args(cfg):
    """Drop `backend_args=None`, which the toolboxes' pipelines state everywhere, and the scopes of what is inherited."""
    if isinstance(cfg, Config):
        return Config(without_backend_args(cfg.to_dict()))
    if isinstance(cfg, dict):
        items = ((k, without_backend_args(v)) for k, v in cfg.items())
        return {k: v for k, v in items if k not in ('backend_args', '_scope_')}
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(without_backend_args(v) for v in cfg)
    return cfg


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
            if model.with_mask or hasattr(model, 'panoptic_head'):
                from mmdet.structures.mask import BitmapMasks

                mask = np.zeros((1, size, size), dtype=np.uint8)
                mask[:, 4:40, 4:40] = 1
                sample.gt_instances.masks = BitmapMasks(mask, size, size)
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


def make_small(cfg: Config) -> None:
    """Let a test afford the model: small crops, few proposals, whose heads cost most of all."""
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 64)
    if 'num_queries' in cfg.model:
        cfg.model.num_queries = 8
    if 'panoptic_head' in cfg.model:
        cfg.model.panoptic_head.num_queries = 8
        cfg.model.train_cfg.num_points = 64
        cfg.model.data_preprocessor.batch_augments = None  # pads to 1024 x 1024
    if 'roi_head' in cfg.model:
        train_cfg, test_cfg = cfg.model.train_cfg, cfg.model.test_cfg
        train_cfg.rpn_proposal.max_per_img = test_cfg.rpn.max_per_img = 8
        for rcnn in train_cfg.rcnn if isinstance(train_cfg.rcnn, list) else [train_cfg.rcnn]:
            rcnn.sampler.num = 8


def is_larger(path: Path) -> bool:
    """Whether the same recipe exists with a smaller size of the network."""
    names = [re.sub('linglo-b[12]', f'linglo-{size}', path.stem) for size in ('b0', 'b1')]
    return any(name < path.stem and (path.parent / f'{name}.py').exists() for name in names)


@pytest.mark.parametrize('path', filter(is_larger, CONFIGS), ids=config_id)
def test_larger_sizes_fit_together(path):
    """All channels from the images to the neck, on ``meta``; the smallest size computes something."""
    cfg = Config.fromfile(path)
    make_small(cfg)
    with torch.device('meta'):
        model = build_model(cfg).train()
        model.extract_feat(torch.empty(2, 3, 64, 64))
    check_channels(cfg, model)


def check_channels(cfg: Config, model) -> None:
    embed_dims = model.backbone.arch['embed_dims']
    channels = [embed_dims[i] for i in model.backbone.out_indices]
    if cfg.default_scope == 'mmpretrain':
        assert model.head.in_channels == channels[-1]
        return
    first = next(cfg.model[k] for k in ('neck', 'decode_head', 'panoptic_head') if k in cfg.model)
    assert first.in_channels == channels
    if 'auxiliary_head' in cfg.model:
        auxiliary = cfg.model.auxiliary_head
        assert auxiliary.in_channels == channels[auxiliary.in_index]


@pytest.mark.parametrize('path', [path for path in CONFIGS if not is_larger(path)], ids=config_id)
def test_builds_takes_a_loss_step_and_predicts(path):
    cfg = Config.fromfile(path)
    make_small(cfg)
    mixed_precision = cfg.optim_wrapper.type == 'AmpOptimWrapper'
    if mixed_precision:
        cfg.optim_wrapper.type = 'OptimWrapper'  # the other one refuses to be built without a GPU
    for part in cfg.model.values():
        if isinstance(part, dict) and 'checkpoint' in (part.get('init_cfg') or {}):
            part.init_cfg = None
    model = build_model(cfg).train()
    model.init_weights()  # some weights of mmdet's DETRs are uninitialized memory before
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    if not path.stem.startswith(PEERS):
        check_channels(cfg, model)
    data = model.data_preprocessor(inputs_for(cfg, model), training=True)
    # On a CPU, mmcv's NMS of the proposals takes float32 only.
    autocast = mixed_precision and 'roi_head' not in cfg.model
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
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
        predictions = model(**data, mode='predict')
    assert len(predictions) == 2
    if 'roi_head' in cfg.model:
        assert all(('masks' in p.pred_instances) == model.with_mask for p in predictions)


@pytest.mark.parametrize('path', CONFIGS, ids=config_id)
def test_common_settings(path):
    cfg = Config.fromfile(path)
    assert cfg.sync_bn == 'torch'
    assert cfg.auto_scale_lr.base_batch_size > 0
    assert cfg.auto_scale_lr.enable is False
    if path.stem.startswith(PEERS):
        return
    assert cfg.model.backbone.type in ('mmlinglo.LinGlo', LinGlo)
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
    theirs = toolbox_config('mmdet', '_base_/models/retinanet_r50_fpn.py').model
    ours = load('coco', 'b0').model
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


@pytest.mark.parametrize('task', ['coco', 'ade20k'])
def test_the_start_is_all_that_a_pvtv2_init_recipe_changes(task):
    plain = load(task, 'b1')
    cfg = leaf(Path(plain.filename).stem.replace('linglo-b1', 'linglo-b1_pvtv2-init'))
    start = cfg.model.backbone.pop('init_cfg')
    del plain.model.backbone['init_cfg']
    assert cfg.model == plain.model
    assert start.type == 'mmlinglo.PVTv2Init'
    dataset = cfg.train_dataloader.dataset
    folder = dataset.data_prefix.img if task == 'coco' else dataset.data_prefix.img_path
    assert Path(start.images) == Path(dataset.data_root) / folder
    theirs = toolbox_config('mmdet', 'pvt/retinanet_pvtv2-b1_fpn_1x_coco.py')
    assert start.checkpoint == theirs.model.backbone.init_cfg.checkpoint


# Recipes that inherit from mmdet's own: what they change of it.
INHERITED = {
    'rtmdet_linglo-b1_8xb32-300e_coco': 'rtmdet/rtmdet_m_8xb32-300e_coco.py',
    'dino-4scale_linglo-b1_8xb2-12e_coco': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'mask2former_linglo-b1_8xb2-lsj-50e_coco': 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
}


@pytest.mark.parametrize('name', INHERITED)
def test_recipes_that_inherit_from_mmdet(name):
    theirs, ours = toolbox_config('mmdet', INHERITED[name]), without_backend_args(leaf(name))
    own = load('coco', 'b1')
    out_indices = ours.model.backbone.get('out_indices', (0, 1, 2, 3))
    assert {**ours.model.backbone, 'out_indices': None} == {
        **own.model.backbone,
        'out_indices': None,
    }
    preprocessor = ours.model.data_preprocessor  # as the backbone was trained on ImageNet
    for key in ('mean', 'std', 'bgr_to_rgb'):
        assert preprocessor[key] == own.model.data_preprocessor[key]
    channels = [EMBED_DIMS['b1'][i] for i in out_indices]
    theirs.model.data_preprocessor.update(
        {k: preprocessor[k] for k in ('mean', 'std', 'bgr_to_rgb')}
    )
    theirs.model.backbone = ours.model.backbone
    part = theirs.model.get('neck', theirs.model.get('panoptic_head'))
    part.in_channels = channels
    if name.startswith('rtmdet'):
        for key in ('neck', 'bbox_head'):
            assert theirs.model[key].norm_cfg.type == 'SyncBN'
            theirs.model[key].norm_cfg.type = 'BN'  # which `sync_bn` makes a SyncBN
    assert ours.model == theirs.model
    for key in (
        'train_dataloader',
        'val_dataloader',
        'test_dataloader',
        'train_cfg',
        'param_scheduler',
        'optim_wrapper',
        'custom_hooks',
    ):
        assert ours.get(key) == theirs.get(key), key
    gpus, batch_size = map(int, re.search(r'_(\d+)xb(\d+)-', name).groups())
    assert ours.train_dataloader.batch_size == batch_size
    assert ours.auto_scale_lr.base_batch_size == gpus * batch_size
    for key in ('reseed', 'picture_errors', 'non_finite'):
        assert ours.default_hooks[key] == own.default_hooks[key]
    assert ours.default_hooks.checkpoint.type == own.default_hooks.checkpoint.type


CASCADE = 'cascade-mask-rcnn_linglo-b2_fpn_4conv1fc-giou_ms-crop-3x_coco'
MMDET_SOURCES = {  # files that have the same heads, data and schedule
    'faster-rcnn_linglo-b0_fpn_1x_coco': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask-rcnn_linglo-b0_fpn_1x_coco': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    CASCADE: 'convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py',
}


@pytest.mark.parametrize('name', MMDET_SOURCES)
def test_two_stage_detectors_match_mmdet(name):
    theirs, ours = toolbox_config('mmdet', MMDET_SOURCES[name]), leaf(name)
    for extractor in ('bbox_roi_extractor', 'mask_roi_extractor'):
        if extractor in theirs.model.roi_head:  # mmcv's own ignores the strides of its input
            theirs.model.roi_head[extractor].roi_layer.use_torchvision = True
    if name == CASCADE:
        for head in theirs.model.roi_head.bbox_head:
            assert head.norm_cfg.type == 'SyncBN'
            head.norm_cfg.type = 'BN'  # which `sync_bn` makes a SyncBN
    assert set(ours.model) == set(theirs.model)
    for key in set(ours.model) - {'backbone', 'neck'}:
        assert ours.model[key] == theirs.model[key], key
    assert {**ours.model.neck, 'in_channels': theirs.model.neck.in_channels} == theirs.model.neck
    for split in ('train', 'val', 'test'):
        assert ours[f'{split}_dataloader'] == theirs[f'{split}_dataloader'], split
    assert ours.test_evaluator == ours.val_evaluator == theirs.val_evaluator
    assert ours.train_cfg == theirs.train_cfg
    assert ours.param_scheduler[1] == theirs.param_scheduler[1]


@pytest.mark.parametrize('size', SIZES)
def test_two_stage_recipes(size):
    """PVT's published `mask_rcnn_pvt_v2_*` and `cascade_mask_rcnn_pvt_v2_b2_fpn_3x_mstrain_fp16`."""
    for name in (f'faster-rcnn_linglo-{size}_fpn_1x_coco', f'mask-rcnn_linglo-{size}_fpn_1x_coco'):
        cfg = leaf(name)
        assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=2e-4, weight_decay=1e-4)
        assert cfg.model.neck.in_channels == EMBED_DIMS[size]
        checkpoint = f'work_dirs/linglo-{size}_8xb128_in1k/epoch_300.pth'
        assert cfg.model.backbone.init_cfg.checkpoint == checkpoint
    assert cfg.param_scheduler == load('coco', size).param_scheduler


def test_cascade_schedule():
    cfg = leaf(CASCADE)
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    rates = learning_rates(cfg, steps=3600, epoch_length=100)
    for step, rate in ((600, 1e-4), (2650, 1e-4), (2750, 1e-5), (3350, 1e-6)):
        assert rates[step] == pytest.approx(rate)


MMSEG_SOURCES = {
    'upernet_linglo-b1_8xb2-160k_ade20k-512x512': (
        'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
    ),
    'segformer_linglo-b1_8xb2-160k_ade20k-512x512': (
        'segformer/segformer_mit-b1_8xb2-160k_ade20k-512x512.py'
    ),
}


@pytest.mark.parametrize('name', MMSEG_SOURCES)
def test_ade20k_160k_recipes_match_mmseg(name):
    theirs, ours = toolbox_config('mmseg', MMSEG_SOURCES[name]), leaf(name)
    for key in {'decode_head', 'auxiliary_head'} & {*ours.model, *theirs.model}:
        head = theirs.model[key]
        head.norm_cfg.type = 'BN'  # which `sync_bn` makes a SyncBN
        head.in_channels = ours.model[key].in_channels
        assert ours.model[key] == head
    assert 'neck' not in ours.model
    assert ours.model.test_cfg == theirs.model.test_cfg
    assert ours.optim_wrapper.optimizer == theirs.optim_wrapper.optimizer
    assert ours.param_scheduler == theirs.param_scheduler
    assert ours.train_cfg == theirs.train_cfg
    assert ours.train_dataloader.batch_size == theirs.train_dataloader.batch_size
    assert ours.train_dataloader.batch_size * 8 == ours.auto_scale_lr.base_batch_size


def test_rates_and_weight_decay_of_the_160k_recipes():
    """No weight decay on the backbone's norms, ten times the rate in the all-MLP head."""
    cfg = leaf('segformer_linglo-b0_8xb2-160k_ade20k-512x512')
    model = build_model(cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d))
        for p in module.parameters()
    }
    for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups:
        for parameter in group['params']:
            in_head = names[id(parameter)].startswith('decode_head.')
            assert group['lr'] == pytest.approx(6e-4 if in_head else 6e-5)
            spared = id(parameter) in norms and not in_head
            assert group['weight_decay'] == (0 if spared else 0.01)


@pytest.mark.parametrize('size', ['b1', 'b2'])
def test_fine_tuning_recipe(size):
    """The 224 px recipe with Swin's published schedule of fine-tuning at 384 px."""
    cfg, recipe = leaf(f'linglo-{size}_in1k-pre_8xb64-30e_in1k-384px'), load('imagenet', size)
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer == {**recipe.optim_wrapper.optimizer, 'lr': 2e-5, 'weight_decay': 1e-8}
    assert cfg.optim_wrapper.paramwise_cfg == recipe.optim_wrapper.paramwise_cfg
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 512
    assert cfg.train_dataloader.sampler == recipe.train_dataloader.sampler
    train = recipe.train_dataloader.dataset.pipeline
    train[1].scale = 384
    assert cfg.train_dataloader.dataset.pipeline == train
    assert [step.type for step in cfg.test_dataloader.dataset.pipeline] == [
        'LoadImageFromFile',
        'Resize',
        'PackInputs',
    ]
    assert cfg.test_dataloader.dataset.pipeline[1].scale == 384
    rates = learning_rates(cfg, steps=300, epoch_length=10)
    assert rates[0] == pytest.approx(2e-8)
    assert max(rates) == pytest.approx(2e-5)
    middle = 2e-7 + (2e-5 - 2e-7) * (1 + math.cos(math.pi * 0.5)) / 2
    assert rates[175] == pytest.approx(middle, rel=0.02)
    assert rates[-1] == pytest.approx(2e-7, rel=0.1)


def test_fine_tuning_starts_from_the_whole_classifier(tmp_path):
    def small(cfg: Config) -> Config:
        cfg.model.backbone.arch = TINY_ARCH
        cfg.model.head.in_channels = TINY_ARCH['embed_dims'][-1]
        return cfg

    source = build_model(small(load('imagenet', 'b2')))
    source.init_weights()
    checkpoint = str(tmp_path / 'epoch_300.pth')
    torch.save(dict(state_dict=source.state_dict()), checkpoint)
    cfg = small(leaf('linglo-b2_in1k-pre_8xb64-30e_in1k-384px'))
    pretrained = load('coco', 'b2').model.backbone.init_cfg
    assert cfg.model.backbone.init_cfg == pretrained
    assert cfg.model.head.init_cfg == {**pretrained, 'prefix': 'head.'}
    for part in (cfg.model.backbone, cfg.model.head):
        part.init_cfg.checkpoint = checkpoint
    model = build_model(cfg)
    model.init_weights()
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def settings(cfg):
    """All settings of a config; types are names, in text configs as in pure Python ones."""
    if isinstance(cfg, (Config, dict)):
        items = ((key, settings(value)) for key, value in cfg.items())
        return {k: v.split('.')[-1] if k == 'type' and isinstance(v, str) else v for k, v in items}
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(settings(value) for value in cfg)
    return cfg.__name__ if isinstance(cfg, type) else cfg


AMP = [path for path in CONFIGS if re.search('[_-]amp[_-]', path.stem)]


@pytest.mark.parametrize('path', AMP, ids=config_id)
def test_mixed_precision_is_all_that_an_amp_recipe_changes(path):
    cfg = Config.fromfile(path)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    cfg.optim_wrapper.type = 'OptimWrapper'
    assert settings(cfg) == settings(leaf(re.sub('amp-|-amp', '', path.stem)))


def test_the_papers_recipes_have_amp_variants():
    assert (
        len({path.parent.name + size for path in AMP for size in SIZES if size in path.stem}) == 9
    )


def test_gradient_checkpointing_is_all_that_the_cp_recipe_changes():
    cfg, plain = (leaf(f'retinanet_linglo-b2_fpn_{x}1x_coco') for x in ('cp-', ''))
    assert cfg.model.backbone.pop('with_cp') is True
    assert settings(cfg) == settings(plain)


def test_pure_python_config():
    """It says what the text config says, and takes what the tools do to a config."""
    path = ROOT / 'configs/coco/retinanet_linglo_b1_fpn_1x_coco_pure_python.py'
    text = load('coco', 'b1')
    cfg = load_config(str(path))
    assert cfg.model.backbone.type is LinGlo
    ours = settings(cfg)
    for key, value in settings(text).items():
        assert ours[key] == value, key
    names = [name for name, _ in build_model(text).named_parameters()]
    assert [name for name, _ in build_model(cfg).named_parameters()] == names
    changed = load_config(str(path), {'model.backbone.arch': 'b0', 'train_cfg.max_epochs': 2})
    assert changed.model.backbone == {**cfg.model.backbone, 'arch': 'b0'}
    assert changed.train_cfg.max_epochs == 2
