# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What OpenMMLab's configs let one combine with our recipes and hooks, each tried once on tiny models."""

import json
import pickle
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from trainings import LAST, SUB_FOLDERS, TASKS, TINY_MODELS, fast_tools, logged, write_tiny_config

pytestmark = pytest.mark.slow
METRICS = dict(detection='coco/bbox_mAP_50', segmentation='mIoU', classification='accuracy/top1')
MIXED = dict(
    detection="""
inner = dict(_base_.train_dataloader.dataset)
inner['pipeline'] = [step for step in inner['pipeline'] if 'Pack' not in step['type']]
pack = _base_.train_dataloader.dataset.pipeline[-1]
train_dataloader = dict(dataset=dict(
    _delete_=True, type='MultiImageMixDataset', dataset=inner,
    pipeline=[dict(type='Mosaic', img_scale=(64, 64)), dict(type='Resize', scale=(64, 64)), pack],
))
""",
    segmentation="""
inner = dict(_base_.train_dataloader.dataset)
inner['pipeline'] = [step for step in inner['pipeline'] if 'Pack' not in step['type']]
pack = _base_.train_dataloader.dataset.pipeline[-1]
train_dataloader = dict(dataset=dict(
    _delete_=True, type='MultiImageMixDataset', dataset=inner,
    pipeline=[dict(type='RandomMosaic', prob=1.0, img_scale=(64, 64)),
              dict(type='Resize', scale=(64, 64)), pack],
))
""",
)
NO_VALIDATION = """
val_cfg = None
val_dataloader = None
val_evaluator = None
"""
WRAPPED = """
inner = dict(_base_.train_dataloader.dataset)
train_dataloader = dict(dataset=dict(_delete_=True, {}))
"""
CASES = dict(
    plain='',
    accumulation='optim_wrapper = dict(accumulative_counts=3)',
    ema="custom_hooks = [dict(type='EMAHook', momentum=0.1, update_buffers=True)]",
    repeated=WRAPPED.format("type='RepeatDataset', times=2, dataset=inner"),
    concatenated=WRAPPED.format("type='ConcatDataset', datasets=[inner, inner]"),
    no_validation=NO_VALIDATION,
    layer_decay="optim_wrapper = dict(constructor='mmlinglo.LayerDecayOptimWrapperConstructor', "
    'paramwise_cfg=dict(layer_decay_rate=0.9))',
    compiled="compile = dict(backend='eager')",
    inductor='compile = True',
    skip="default_hooks = dict(non_finite=dict(action='skip'))",
    workers='train_dataloader = dict(num_workers=1, persistent_workers=True)',
)


@pytest.fixture(scope='module')
def run():
    with fast_tools() as tool:
        yield tool


def finite_checkpoint(work_dir, task):
    state = torch.load(work_dir / f'{LAST[task]}.pth', weights_only=False)
    assert all(v.isfinite().all() for v in state['state_dict'].values())
    return state


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('case', [*CASES, 'mixed'])
def test_trains_and_is_tested(case, task, run, shapes, tmp_path):
    if case == 'mixed' and task not in MIXED:
        pytest.skip('mmpretrain mixes in its models')
    if case == 'inductor' and (task != 'classification' or not shutil.which('g++')):
        pytest.skip('torch.compile needs g++, and ten minutes for the other tasks')
    extra = MIXED[task] if case == 'mixed' else CASES[case]
    config = write_tiny_config(tmp_path, shapes, task, extra)
    every = ['--cfg-options', 'default_hooks.logger.interval=1']
    run('tools/train.py', config, '--work-dir', tmp_path / 'work', *every)
    finite_checkpoint(tmp_path / 'work', task)
    lines = logged(tmp_path / 'work')
    assert any('loss' in line for line in lines)
    assert any(METRICS[task] in line for line in lines) == (case != 'no_validation')
    run('tools/test.py', config, tmp_path / f'work/{LAST[task]}.pth', '--work-dir', tmp_path / 't')
    (metrics,) = (tmp_path / 't').glob('*/*.json')
    assert METRICS[task] in json.loads(metrics.read_text())


@pytest.mark.parametrize('case', ['accumulation', 'ema', 'compiled', 'mixed', 'early_stopping'])
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_resumed_equals_uninterrupted(case, task, run, shapes, tmp_path):
    """Killed in the middle and resumed: the last checkpoint is bitwise the same."""
    if case == 'early_stopping':
        extra = (
            f"custom_hooks = [dict(type='EarlyStoppingHook', monitor={METRICS[task]!r}, "
            "rule='greater', min_delta=1000, patience=9)]"
        )
    else:
        # what is accumulated when an epoch ends is not in a checkpoint
        extra = (MIXED[task] if case == 'mixed' else CASES[case]).replace('counts=3', 'counts=2')
    extra += '\nrandomness = dict(seed=1)'
    config = write_tiny_config(tmp_path, shapes, task, extra)
    run('tools/train.py', config, '--work-dir', tmp_path / 'whole')
    first = 'iter_2' if task == 'segmentation' else 'epoch_1'
    checkpoint = tmp_path / f'whole/{first}.pth'
    run('tools/train.py', config, '--work-dir', tmp_path / 'resumed', '--resume', checkpoint)
    whole, resumed = (finite_checkpoint(tmp_path / name, task) for name in ('whole', 'resumed'))
    for key in ('state_dict', 'ema_state_dict'):
        for name, value in whole.get(key, {}).items():
            assert torch.equal(value, resumed[key][name]), (key, name)
    assert whole['optimizer']['state'].keys() == resumed['optimizer']['state'].keys()


def test_stopped_early_and_resumed(run, shapes, tmp_path):
    """The same command once more does not train on."""
    config = write_tiny_config(
        tmp_path,
        shapes,
        'classification',
        'train_cfg = dict(max_epochs=6, val_interval=1)\n'
        "custom_hooks = [dict(type='EarlyStoppingHook', monitor='accuracy/top1', "
        "rule='greater', min_delta=1000, patience=2)]",
    )
    for _ in range(2):
        run('tools/train.py', config, '--work-dir', tmp_path / 'work', '--resume')
        found = sorted(path.name for path in (tmp_path / 'work').glob('epoch_*.pth'))
        # the first score is no improvement either, with this min_delta
        assert found[-1] == 'epoch_3.pth', found


@pytest.mark.parametrize('bare', [True, False])
def test_averages_are_tested_whatever_the_names(bare, run, shapes, tmp_path):
    """Of DistributedDataParallel's names and of a bare state dict, with the same predictions."""
    config = write_tiny_config(tmp_path, shapes, 'classification', CASES['ema'])
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    weights = finite_checkpoint(tmp_path / 'work', 'classification')['state_dict']
    renamed = {f'module.{name}': value for name, value in weights.items()}
    scores = []
    for name, state in dict(plain=weights, renamed=renamed).items():
        file, out = tmp_path / f'{name}.pth', tmp_path / f'{name}.pkl'
        torch.save(state if bare else dict(state_dict=state), file)
        run('tools/test.py', config, file, '--work-dir', tmp_path / name, '--out', out)
        scores.append([sample['pred_score'] for sample in pickle.loads(out.read_bytes())])
    assert all(torch.equal(*pair) for pair in zip(*scores))


@pytest.mark.parametrize('dataset', ['detection', 'classification'])
def test_class_balanced(dataset, run, shapes, tmp_path):
    extra = WRAPPED.format("type='ClassBalancedDataset', oversample_thr=0.9, dataset=inner")
    config = write_tiny_config(tmp_path, shapes, dataset, extra)
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    finite_checkpoint(tmp_path / 'work', dataset)


def test_class_agnostic_nms(run, shapes, tmp_path):
    extra = (
        "model = dict(test_cfg=dict(nms=dict(type='nms', iou_threshold=0.01, class_agnostic=True)))"
    )
    config = write_tiny_config(tmp_path, shapes, 'detection', extra)
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    out = tmp_path / 'boxes.pkl'
    args = [config, tmp_path / 'work/epoch_2.pth', '--work-dir', tmp_path / 't', '--out', out]
    run('tools/test.py', *args)
    from torchvision.ops import box_iou

    for prediction in pickle.loads(out.read_bytes()):
        boxes = prediction['pred_instances']['bboxes']
        overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
        assert overlaps.numel() == 0 or overlaps.max() <= 0.011


@pytest.mark.parametrize('batch_size', [1, 2])
def test_slide_mode_on_pictures_smaller_than_the_crop(batch_size, run, shapes, tmp_path):
    extra = (
        "model = dict(test_cfg=dict(mode='slide', crop_size=(96, 96), stride=(64, 64)))\n"
        "resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)\n"
        'test_pipeline = [_base_.test_pipeline[0], resize, *_base_.test_pipeline[2:]]\n'
        f'val_dataloader = dict(batch_size={batch_size}, dataset=dict(pipeline=test_pipeline))\n'
        'test_dataloader = val_dataloader'
    )
    config = write_tiny_config(tmp_path, shapes, 'segmentation', extra)
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    out = tmp_path / 'labels'
    args = [config, tmp_path / 'work/iter_4.pth', '--work-dir', tmp_path / 't', '--out', out]
    run('tools/test.py', *args)
    assert len(list(out.glob('*.png'))) == 8


TTA = dict(
    detection=('mmdet', ''),
    classification=('mmpretrain', ''),
    segmentation=(
        'mmseg',
        "tta_model = dict(type='SegTTAModel')\n"
        'tta_pipeline = [\n'
        "    dict(type='LoadImageFromFile'),\n"
        "    dict(type='TestTimeAug', transforms=[\n"
        "        [dict(type='Resize', scale=(64, 64), keep_ratio=True)],\n"
        "        [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],\n"
        "        [dict(type='LoadAnnotations', reduce_zero_label=True)],\n"
        "        [dict(type='PackSegInputs')],\n"
        '    ]),\n'
        ']\n',
    ),
)


@pytest.mark.parametrize('task', TASKS)
def test_time_augmentation_by_the_toolboxes_tools(task, run, shapes, tmp_path):
    package, extra = TTA[task]
    config = write_tiny_config(tmp_path, shapes, task, extra)
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    tool = Path(find_spec(package).submodule_search_locations[0]) / '.mim/tools/test.py'
    checkpoint = tmp_path / f'work/{LAST[task]}.pth'
    run(tool, config, checkpoint, '--work-dir', tmp_path / 't', '--tta')
    (metrics,) = (tmp_path / 't').glob('*/*.json')
    assert METRICS[task] in json.loads(metrics.read_text())


# Habits


@pytest.mark.parametrize('task', TASKS)
def test_without_data_workers(task, run, shapes, tmp_path):
    """num_workers=0, for debugging, although the recipes ask for persistent workers."""
    config = write_tiny_config(tmp_path, shapes, task, '')
    splits = ('train', 'val', 'test')
    options = [f'{split}_dataloader.num_workers=0' for split in splits]
    options += [f'{split}_dataloader.persistent_workers=True' for split in splits]
    options += ['train_dataloader.prefetch_factor=2']
    run('tools/train.py', config, '--work-dir', tmp_path / 'w', '--cfg-options', *options)
    checkpoint = tmp_path / f'w/{LAST[task]}.pth'
    args = [config, checkpoint, '--work-dir', tmp_path / 't', '--cfg-options', *options]
    run('tools/test.py', *args)


@pytest.mark.parametrize('length', [1, 5, 50])
@pytest.mark.parametrize('task', TASKS)
def test_short_trainings_with_the_templates(task, length, run, shapes, tmp_path):
    """A copy of a template whose length is set in it, as everybody begins."""
    template = dict(
        detection='retinanet_linglo-b0_fpn_1xb8-50e_custom',
        segmentation='fpn_linglo-b0_1xb8-8k_custom-512x512',
        classification='linglo-b0_1xb64-100e_custom',
    )[task]
    if task != 'segmentation' and length == 50:
        length = 2  # epochs
    root = str(shapes / SUB_FOLDERS[task]).rstrip('/')
    classes = Config.fromfile(ROOT / 'configs/quickstart' / TASKS[task]).get('metainfo', {})
    classes = classes.get('classes', ('disc', 'square', 'star', 'triangle'))
    values = dict(
        _base_=None, data_root=repr(root), classes=repr(tuple(classes)), batch_size='4',
        max_iters=str(length), max_epochs=str(length), crop_size='64', img_size='64',
        scale='(64, 64)', reduce_zero_label='True', ignore_index='255',
    )  # fmt: skip
    text = (ROOT / f'configs/custom/{template}.py').read_text()
    text = re.sub(r"_base_ = '\.\./", f"_base_ = '{ROOT}/configs/", text)
    head, rest = text.split('# ---- follows from the above')
    for name, value in values.items():
        if value is not None:
            head = re.sub(rf'^{name} = [^#\n]*', f'{name} = {value}  ', head, flags=re.M)
    tiny = [
        "_base_ = './copy.py'",
        'train_dataloader = dict(num_workers=0)\nval_dataloader = dict(num_workers=0)',
    ]
    (tmp_path / 'copy.py').write_text(f'{head}# ---- follows from the above{rest}')
    config = tmp_path / 'config.py'
    config.write_text('\n'.join([*tiny, TINY_MODELS[task]]))
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    name = 'iter' if task == 'segmentation' else 'epoch'
    state = torch.load(tmp_path / f'work/{name}_{length}.pth', weights_only=False)
    assert all(v.isfinite().all() for v in state['state_dict'].values())


@pytest.mark.parametrize('task', TASKS)
def test_recipes_cut_short_on_the_command_line(task, run, shapes, tmp_path):
    config = write_tiny_config(tmp_path, shapes, task)
    key = 'max_iters' if task == 'segmentation' else 'max_epochs'
    args = [config, '--work-dir', tmp_path / 'work', '--cfg-options', f'train_cfg.{key}=1']
    run('tools/train.py', *args)


@pytest.mark.parametrize('task', TASKS)
def test_predictions_with_several_evaluators(task, run, shapes, tmp_path):
    second = dict(
        detection="dict(type='VOCMetric')",
        segmentation="dict(type='IoUMetric', prefix='second')",
        classification="dict(type='SingleLabelMetric')",
    )[task]
    config = write_tiny_config(tmp_path, shapes, task)
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    several = tmp_path / 'several.py'
    several.write_text(
        f"_base_ = './config.py'\ntest_evaluator = [_base_.test_evaluator, {second}]\n"
    )
    if task == 'detection':
        several.write_text(
            "_base_ = './config.py'\n"
            'test_evaluator = [_base_.test_evaluator, dict(_base_.test_evaluator, prefix="again")]\n'
        )
    out = tmp_path / ('labels' if task == 'segmentation' else 'predictions.pkl')
    checkpoint = tmp_path / f'work/{LAST[task]}.pth'
    run('tools/test.py', several, checkpoint, '--work-dir', tmp_path / 't', '--out', out)
    if task == 'segmentation':
        assert len(list(out.glob('*.png'))) == 8
    else:
        assert len(pickle.loads(out.read_bytes())) == 8
    (metrics,) = (tmp_path / 't').glob('*/*.json')
    found = json.loads(metrics.read_text())
    assert METRICS[task] in found
    assert any(key.startswith(('again/', 'second/', 'single-label/')) for key in found)


@pytest.mark.parametrize('task', TASKS)
def test_another_number_of_classes_is_not_resumed(task, run, shapes, tmp_path):
    config = write_tiny_config(tmp_path, shapes, task)
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    part = dict(detection='bbox_head', segmentation='decode_head', classification='head')[task]
    options = ['--cfg-options', f'model.{part}.num_classes=7']
    args = [config, '--work-dir', tmp_path / 'work', '--resume', *options]
    result = run('tools/train.py', *args, check=False)
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert 'does not fit this model' in last
    assert '--cfg-options load_from=' in last


def test_a_changed_optimizer_is_not_resumed(run, shapes, tmp_path):
    config = write_tiny_config(tmp_path, shapes, 'detection')
    run('tools/train.py', config, '--work-dir', tmp_path / 'work')
    args = ['--work-dir', tmp_path / 'work', '--resume', '--cfg-options']
    groups = 'optim_wrapper.paramwise_cfg.bypass_duplicate=True'
    result = run('tools/train.py', config, *args, groups, check=False)
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    assert 'the same model, optimizer and paramwise_cfg' in result.stderr
