# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The CIFAR-10 campaign: its configs, its data, what counts as finished, and what its table says."""

import csv
import hashlib
import json
import pickle
import signal
import subprocess

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmlinglo.analysis import ablations, campaign

CONFIGS = ROOT / 'configs/cifar10'
WO_CH = dict(
    embed_dims=(150, 150, 150, 150),
    depths=(2, 3, 3, 2),
    num_heads=(3, 3, 3, 3),
    mlp_ratio=(8, 8, 4, 4),
    strides=(16, 1, 1, 1),
)
WO_C = dict(overlap=False, pos_encoding='absolute', img_size=96)
B0 = dict(type='mmlinglo.LinGlo', arch='b0', out_indices=(3,), drop_path_rate=0.0)
BACKBONES = {
    'linglo-b0': B0,
    'linglo-b0-cpe': dict(B0, pos_encoding='CPE'),
    'linglo-b0-r-cpe': dict(B0, pos_encoding='R-CPE'),
    'linglo-b0-p-cpe': dict(B0, pos_encoding='P-CPE'),
    'linglo-b0-cchh': dict(B0, layout='C-C-H-H'),
    'linglo-b0-chhh': dict(B0, layout='C-H-H-H'),
    'linglo-b0-dot-product': dict(B0, attention='dot_product'),
    'linglo-b0-wo-c': dict(B0, **WO_C),
    'linglo-b0-wo-ch': dict(B0, **WO_C, arch=WO_CH),
    'pvtv2-b0': dict(
        type='TIMMBackbone', model_name='pvt_v2_b0', features_only=True, out_indices=(3,)
    ),
    'resnet18': dict(type='ResNet', depth=18),
}
IN_CHANNELS = {'linglo-b0-wo-ch': 150, 'resnet18': 512}


def load(row):
    return Config.fromfile(CONFIGS / f'{row}_1xb128-30e_cifar10.py')


@pytest.mark.parametrize('row', BACKBONES)
def test_rows_differ_in_what_their_name_says(row):
    expected, cfg = load('linglo-b0').to_dict(), load(row).to_dict()
    assert cfg['model']['backbone'] == BACKBONES[row]
    expected['model']['backbone'] = BACKBONES[row]
    expected['model']['head']['in_channels'] = IN_CHANNELS.get(row, 256)
    if 'wo-c' in row:
        pos_embed = dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0)))
        expected['optim_wrapper']['paramwise_cfg'].update(pos_embed)
    assert cfg == expected


def test_rows_are_the_configs_and_the_backbones_above():
    assert set(BACKBONES) == set(ablations.ROWS)
    names = {path.name for path in CONFIGS.glob('*.py')}
    assert names == {f'{row}_1xb128-30e_cifar10.py' for row in BACKBONES}


def test_papers_numbers():
    """Tables 5 and 6; the other rows have none."""
    given = {name: row.paper_top1 for name, row in ablations.ROWS.items() if row.paper_top1}
    assert given == {
        'linglo-b0': 69.7,
        'linglo-b0-cchh': 67.2,
        'linglo-b0-chhh': 68.8,
        'linglo-b0-cpe': 68.5,
        'linglo-b0-r-cpe': 69.2,
        'linglo-b0-p-cpe': 69.3,
    }


def write_pickles(folder, images, labels, monkeypatch):
    """CIFAR-10's own files, of ten images in each of the six; their checksums are made known."""
    (folder / 'cifar-10-batches-py').mkdir(parents=True)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / 'cifar-10-batches-py' / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name, chosen):
        flat = images[chosen].transpose(0, 3, 1, 2).reshape(len(chosen), -1)
        return write(name, dict(data=flat, labels=[labels[i] for i in chosen]))

    from mmpretrain.datasets import CIFAR10

    train = [batch(f'data_batch_{i + 1}', range(10 * i, 10 * i + 10)) for i in range(5)]
    monkeypatch.setattr(CIFAR10, 'train_list', train)
    monkeypatch.setattr(CIFAR10, 'test_list', [batch('test_batch', range(50, 60))])


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The same sixty images as pickles and as folders: five of each class for training, one for testing."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)  # RGB
    labels = [i % 10 for i in range(60)]
    write_pickles(tmp_path / 'pickles', images, labels, monkeypatch)
    from mmpretrain.datasets import CIFAR10

    for i, image in enumerate(images):
        split = 'train' if i < 50 else 'test'
        path = tmp_path / 'folders' / split / CIFAR10.METAINFO['classes'][labels[i]] / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image[..., ::-1])
    return tmp_path


def inputs_of_test_set(cfg):
    init_default_scope('mmpretrain')
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    preprocessor = MODELS.build(dict(type='ClsDataPreprocessor', **cfg.data_preprocessor))
    samples = [dataset[i] for i in range(len(dataset))]
    batch = dict(
        inputs=torch.stack([sample['inputs'] for sample in samples]),
        data_samples=[sample['data_samples'] for sample in samples],
    )
    labels = [int(sample['data_samples'].gt_label) for sample in samples]
    return preprocessor(batch)['inputs'], labels


def test_pickles_and_folders_are_the_same_data(data):
    cfg = load('linglo-b0')
    cfg.val_dataloader.dataset.data_root = str(data / 'pickles')
    pickles, labels = inputs_of_test_set(cfg)
    folder = Config.fromfile(ROOT / 'configs/_base_/datasets/cifar10_folder_bs128_96.py')
    folder.val_dataloader.dataset.data_root = str(data / 'folders')
    folders, folder_labels = inputs_of_test_set(folder)
    assert pickles.shape == (10, 3, 96, 96)
    assert labels == folder_labels == list(range(10))
    assert torch.equal(pickles, folders)


@pytest.mark.parametrize(
    ('fraction', 'kept'), [(0.4, range(20)), (1.0, range(50)), (0.01, range(10))]
)
def test_subset_is_the_first_of_each_class(data, fraction, kept):
    """Image i of the pickles is of class i mod 10: the first two of each class are the first 20."""
    cfg = load('linglo-b0')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.update(data_root=str(data / 'pickles'), pipeline=[])
    cfg.train_dataloader.batch_size = 5
    full = DATASETS.build(cfg.train_dataloader.dataset)
    assert campaign.count_images([cfg], fraction) == dict(train=len(kept), test=10)
    subset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(subset) == len(kept)
    for i, j in enumerate(kept):
        assert np.array_equal(subset[i]['img'], full[j]['img'])
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert len(DATASETS.build(loader.dataset)) == 10


def test_every_config_gets_the_share(data):
    configs = [load('linglo-b0'), load('resnet18')]
    for cfg in configs:
        cfg.train_dataloader.batch_size = 15
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.data_root = str(data / 'pickles')
    assert campaign.count_images(configs, 0.6, 0.5) == dict(train=30, test=10)
    first, second = (
        [cfg[f'{name}_dataloader'].dataset.indices for name in ('train', 'val', 'test')]
        for cfg in configs
    )
    assert first == second == [list(range(30)), list(range(10)), list(range(10))]
    for cfg in configs:
        cfg.train_dataloader.batch_size = 16
    with pytest.raises(ValueError, match='30 training images are less than two batches of 16'):
        campaign.count_images(configs)


@pytest.mark.parametrize('fraction', [0, 1.5])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=rf'must be in \(0, 1\], got {fraction}'):
        campaign.count_images([load('linglo-b0')], fraction)


def test_parameters():
    """Of ResNet18 with 10 classes: 11,689,512 with 1000 (He et al.), less 990 rows of 512 + 1."""
    expected = (11_689_512 - 990 * 513) / 1e6
    assert ablations.count_parameters(load('resnet18')) == dict(
        params_m=expected, deployed_params_m=expected
    )
    linglo = ablations.count_parameters(load('linglo-b0'))
    # The three further branches of each block, of 9 weights and 2 of the norm a channel, the two of
    # the first branch's norm, and the bias that the fused convolution has.
    channels = sum(
        depth * ratio * dims
        for depth, ratio, dims in zip((2, 3, 3, 2), (8, 8, 4, 4), (32, 64, 160, 256))
    )
    fewer = channels * (4 * (9 + 2) - 9 - 1)
    assert linglo['params_m'] - linglo['deployed_params_m'] == pytest.approx(fewer / 1e6)


def test_model_that_cannot_be_built():
    cfg = load('resnet18')
    cfg.model.backbone.img_size = 96
    with pytest.raises(ValueError, match='img_size'):
        ablations.count_parameters(cfg)


def test_settings_are_kept_and_compared(tmp_path):
    path = tmp_path / 'row/seed0.py'
    cfg = load('linglo-b0-wo-ch')
    campaign.keep_settings(cfg, path)
    written = path.stat().st_mtime_ns
    campaign.keep_settings(load('linglo-b0-wo-ch'), path)
    assert path.stat().st_mtime_ns == written
    assert [p.name for p in path.parent.iterdir()] == ['seed0.py']
    cfg.train_cfg.max_epochs = 5
    with pytest.raises(
        ValueError, match=r'other settings[\s\S]*-.*max_epochs=30[\s\S]*\+.*max_epochs=5'
    ):
        campaign.keep_settings(cfg, path)
    (tmp_path / 'row/seed1').mkdir()
    with pytest.raises(ValueError, match='without its settings'):
        campaign.keep_settings(cfg, tmp_path / 'row/seed1.py')


def test_a_training_is_taken_once(tmp_path):
    path = tmp_path / 'seed0.lock'
    with campaign.lock(path) as first:
        assert first is not None
        with campaign.lock(path) as second:
            assert second is None
    with campaign.lock(path) as third:
        assert third is not None


def write_log(work_dir, part, top1):
    """What a part of a training leaves: {epoch: accuracy}."""
    folder = work_dir / part / 'vis_data'
    folder.mkdir(parents=True)
    lines = []
    for epoch, value in top1.items():
        lines.append(dict(loss=1.0, lr=0.1, epoch=epoch, iter=10 * epoch, step=10 * epoch))
        if value is not None:
            lines.append({'accuracy/top1': value, 'time': 0.1, 'step': epoch})
    (folder / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_where_a_training_goes_on(tmp_path):
    settings = tmp_path / 'seed0.py'
    settings.write_text('train_cfg = dict(max_epochs=4)\n')
    work_dir = tmp_path / 'seed0'
    assert not campaign.is_finished(tmp_path / 'never.py')
    assert campaign.read_run(work_dir).empty
    write_log(work_dir, '20260101_000000', {1: None})
    assert campaign.read_run(work_dir).empty
    assert campaign.checkpoint_to_resume(work_dir) is None
    # Stopped while epoch 3 was validated; of the first two epochs, as usual, both checkpoints remain.
    write_log(work_dir, '20260101_000001', {1: 20.0, 2: 30.0, 3: None})
    for epoch in (2, 3):
        (work_dir / f'epoch_{epoch}.pth').touch()
    assert campaign.checkpoint_to_resume(work_dir) == work_dir / 'epoch_2.pth'
    write_log(work_dir, '20260101_000002', {3: 35.0, 4: None})
    (work_dir / 'epoch_4.pth').touch()
    assert not campaign.is_finished(settings)
    assert campaign.checkpoint_to_resume(work_dir) == work_dir / 'epoch_3.pth'
    write_log(work_dir, '20260101_000003', {4: 40.0})
    assert campaign.is_finished(settings)
    assert campaign.read_run(work_dir).value.tolist() == [20.0, 30.0, 35.0, 40.0]
    (work_dir / 'epoch_4.pth').unlink()
    assert not campaign.is_finished(settings)


PROGRAM = """
import json, sys
from pathlib import Path
settings, _, work_dir, *resume = sys.argv[1:]
work_dir = Path(work_dir)
first = int(resume[1].split('epoch_')[1][0]) + 1 if resume else 1
for epoch in range(first, 4):
    if epoch == 3 and not resume:
        print('stopped before epoch 3')
        sys.exit(1)
    folder = work_dir / f'run{first}{epoch}' / 'vis_data'
    folder.mkdir(parents=True)
    row = {'accuracy/top1': 10.0 * epoch, 'step': epoch}
    (folder / 'scalars.json').write_text(json.dumps(row) + chr(10))
    (work_dir / f'epoch_{epoch}.pth').touch()
print('arguments', settings, *resume)
"""


def test_a_training_goes_on_and_keeps_its_last_checkpoint(tmp_path):
    """Of a program that fails after two of three epochs when it starts from nothing."""
    (tmp_path / 'train.py').write_text(PROGRAM)
    settings, work_dir = tmp_path / 'seed0.py', tmp_path / 'seed0'
    settings.write_text('train_cfg = dict(max_epochs=3)\n')
    with campaign.lock(tmp_path / 'seed0.lock') as locked:
        assert not campaign.train(tmp_path / 'train.py', settings, locked)
        assert sorted(path.name for path in work_dir.glob('*.pth')) == [
            'epoch_1.pth',
            'epoch_2.pth',
        ]
        assert campaign.train(tmp_path / 'train.py', settings, locked)
    assert [path.name for path in work_dir.glob('*.pth')] == ['epoch_3.pth']
    assert (work_dir / 'train.log').read_text().splitlines() == [
        'stopped before epoch 3',
        f'arguments {settings} --resume {work_dir / "epoch_2.pth"}',
    ]


def test_an_interrupted_campaign_ends_its_training(tmp_path, monkeypatch):
    (tmp_path / 'train.py').write_text('import time\ntime.sleep(600)\n')
    settings = tmp_path / 'seed0.py'
    settings.write_text('train_cfg = dict(max_epochs=3)\n')
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(campaign.subprocess, 'Popen', Interrupted)
    with campaign.lock(tmp_path / 'seed0.lock') as locked:
        with pytest.raises(KeyboardInterrupt):
            campaign.train(tmp_path / 'train.py', settings, locked)
    assert started[0].returncode == -signal.SIGKILL


def runs_of(**top1):
    """Trainings of two epochs by row, with these accuracies after the second."""
    rows = [
        dict(row=name.replace('_', '-'), run=f'seed{seed}', step=step, value=value)
        for name, values in top1.items()
        for seed, last in enumerate(values)
        for step, value in ((1, 10.0), (2, last))
    ]
    return pd.DataFrame(rows)


def orders(runs):
    return ablations.order_rows(ablations.summarize(runs[runs.step == 2], list(ablations.ROWS)))


def verdicts(runs):
    return {row['order']: row['verdict'] for row in orders(runs)}


def test_summary():
    runs = runs_of(linglo_b0=[50.0, 53.0], pvtv2_b0=[48.5])
    summary = ablations.summarize(runs[runs.step == 2], list(ablations.ROWS))
    assert list(summary.index) == list(ablations.ROWS)
    assert summary.loc['linglo-b0'].tolist() == [2, 51.5, 50.0, 53.0]
    assert summary.loc['pvtv2-b0'].tolist() == [1, 48.5, 48.5, 48.5]
    assert summary.seeds['resnet18'] == 0
    assert summary.loc['resnet18'][1:].isna().all()


def test_order_that_held():
    found = verdicts(
        runs_of(linglo_b0=[60.0, 61.0], linglo_b0_chhh=[57.0, 58.5], linglo_b0_cchh=[50.0, 52.0])
    )
    assert found['H-H-H-H > C-H-H-H > C-C-H-H'] == 'held'
    assert found['H-H-H-H > C-C-H-H'] == found['C-H-H-H > C-C-H-H'] == 'held'
    assert found['RP-CPE > P-CPE > R-CPE > CPE'] == found['RP-CPE > P-CPE'] == 'missing'


def test_order_within_noise():
    """Means 60.5 and 59.5, ranges 1 and 2: the difference of 1 is not beyond 2."""
    runs = runs_of(linglo_b0=[60.0, 61.0], linglo_b0_chhh=[58.5, 60.5], linglo_b0_cchh=[50.0, 52.0])
    found = verdicts(runs)
    assert found['H-H-H-H > C-H-H-H'] == 'within noise'
    assert found['H-H-H-H > C-H-H-H > C-C-H-H'] == 'within noise'
    row = next(r for r in orders(runs) if r['order'] == 'H-H-H-H > C-H-H-H')
    assert (row['paper'], row['difference'], row['spread'], row['paper_difference']) == (
        'Table 5',
        1.0,
        2.0,
        0.9,
    )


def test_order_that_did_not_hold():
    found = verdicts(
        runs_of(linglo_b0=[50.0, 50.5], linglo_b0_wo_c=[55.0, 55.5], linglo_b0_wo_ch=[40.0])
    )
    assert found['LinGlo > w/o-C'] == 'did not hold'
    assert found['LinGlo > w/o-CH'] == found['w/o-C > w/o-CH'] == 'one seed: undecided'
    assert found['LinGlo > w/o-C > w/o-CH'] == 'did not hold'


def test_one_seed_is_undecided():
    found = verdicts(
        runs_of(linglo_b0=[60.0, 61.0], linglo_b0_chhh=[10.0, 10.0], linglo_b0_cchh=[5.0])
    )
    assert found['H-H-H-H > C-H-H-H'] == 'held'
    assert found['H-H-H-H > C-H-H-H > C-C-H-H'] == 'one seed: undecided'


def test_equal_means_are_within_noise():
    found = verdicts(runs_of(linglo_b0=[60.0, 60.0], linglo_b0_wo_c=[60.0, 60.0]))
    assert found['LinGlo > w/o-C'] == 'within noise'


def test_files(tmp_path):
    runs = runs_of(linglo_b0=[50.0, 53.0], linglo_b0_cpe=[48.0, 49.0], pvtv2_b0=[48.5])
    params = {row: dict(params_m=3.5, deployed_params_m=3.3) for row in ablations.ROWS}
    source = dict(date='2026-01-01', device='cpu', commit='0123', command='run_ablations.py')
    out = tmp_path / 'results/campaign'
    text = ablations.write_results(out, runs, params, 'Ten images', source)
    assert {path.name for path in out.parent.iterdir()} == {
        'campaign.json',
        'campaign.csv',
        'campaign.md',
        'campaign.png',
        'campaign_orders.json',
        'campaign_orders.csv',
    }
    assert (out.parent / 'campaign.md').read_text() == text + '\n'
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()]
    assert ['Table 6', 'CPE', '3.5', '3.3', '2', '48.50 (48.00-49.00)', '68.5'] in lines
    assert ['peer', 'PVTv2-B0', '3.5', '3.3', '1', '48.50', ''] in lines
    assert ['peer', 'ResNet18', '3.5', '3.3', '0', 'missing', ''] in lines
    # 51.5 - 48.5; the larger range is 53 - 50
    assert ['Table 6', 'RP-CPE > CPE', 'within noise', '+3.00', '3.00', '+1.20'] in lines
    report = json.loads((out.parent / 'campaign.json').read_text())
    assert report['provenance'] == source
    assert report['rows'][0]['top1_mean'] == 51.5
    with open(out.parent / 'campaign_orders.csv') as file:
        orders = {row['order']: row for row in csv.DictReader(file)}
    assert orders['RP-CPE > CPE']['verdict'] == 'within noise'
    assert cv2.imread(str(out.parent / 'campaign.png')).shape[:2] == (1200, 1800)
