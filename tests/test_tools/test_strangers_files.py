# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Files of strangers: no code of theirs runs, and nothing is written outside of the output folder."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import strangers
import torch
from conftest import ROOT, TINY_ARCH, run_tool
from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS, VISUALIZERS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.structures import InstanceData, PixelData

from mmlinglo import LinGlo
from mmlinglo.checkpoint import use_in_mmengine
from mmlinglo.utils import CheckpointError, load_checkpoint_file
from mmlinglo.utils.cli import load_config
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.pvtv2 import load_pvtv2

CLASSIFIER = ROOT / 'configs/quickstart/linglo-b0_2xb16-8e_shapes.py'
CONFIGS = dict(
    mmdet=ROOT / 'configs/quickstart/retinanet_linglo-b0_fpn_2xb4-3e_shapes.py',
    mmseg=ROOT / 'configs/quickstart/fpn_linglo-b0_2xb4-360_shapes-160x160.py',
    mmpretrain=CLASSIFIER,
)
# Tool and its arguments; CHECKPOINT and OUT are replaced.
TOOLS = {
    'test.py': [CLASSIFIER, 'CHECKPOINT', '--work-dir', 'OUT'],
    'infer.py': [CLASSIFIER, 'CHECKPOINT', 'PICTURE', '--out-dir', 'OUT'],
    'visualization/vis_saliency.py': [CLASSIFIER, 'CHECKPOINT', 'PICTURE', '--out-dir', 'OUT'],
    'model_converters/reparameterize_model.py': [CLASSIFIER, 'CHECKPOINT', 'OUT/new.pth'],
    'model_converters/publish_model.py': ['CHECKPOINT', 'OUT/new.pth'],
    'model_converters/pvtv2_to_linglo.py': [CLASSIFIER, 'CHECKPOINT', 'OUT/new.pth'],
    'deployment/export_onnx.py': [CLASSIFIER, 'CHECKPOINT', '--out', 'OUT/new.onnx'],
}
HOSTILE = ('../../x.jpg', 'a/../../../x.jpg', '..x.jpg', '%s{0}.jpg', '~.jpg', '-x.jpg', 'a\n.jpg')


@pytest.fixture(autouse=True)
def _own_loaders(monkeypatch):
    """What the tools change in their process."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a tool's main() in this process, with arguments from TOOLS."""

    def call(name, checkpoint, *more):
        spec = importlib.util.spec_from_file_location('tool', ROOT / 'tools' / name)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        picture = tmp_path / 'picture.png'
        cv2.imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
        replaced = {'CHECKPOINT': checkpoint, 'PICTURE': picture, 'OUT': tmp_path / 'out'}
        words = [name, *TOOLS[name], *more]
        for key, value in replaced.items():
            words = [str(word).replace(key, str(value)) for word in words]
        monkeypatch.setattr(sys, 'argv', words)
        tool.main()

    return call


def write_strangers_file(kind, path, written):
    if kind == 'pickle':
        meta = dict(epoch=1, iter=1, dataset_meta=strangers.WritesFile(written))
        torch.save(dict(meta=meta, state_dict=dict(weight=torch.rand(2))), path)
    else:
        strangers.save_pickle(path, getattr(strangers, kind)(written))
    return path


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['pickle', 'getattr_exploit', 'builtins_exploit'])
def test_the_payloads_work_where_nothing_is_refused(kind, tmp_path):
    """In a process of its own: they break it. mmengine's own loader runs each of them."""
    file = write_strangers_file(kind, tmp_path / 'bad.pth', tmp_path / 'written')
    program = (
        f'from mmengine.runner.checkpoint import _load_checkpoint as load; load({str(file)!r})'
    )
    subprocess.run([sys.executable, '-c', program], capture_output=True, check=False)
    assert (tmp_path / 'written').exists()


@pytest.mark.parametrize('kind', ['pickle', 'getattr_exploit', 'builtins_exploit'])
@pytest.mark.parametrize('tool', TOOLS)
def test_no_tool_runs_code_from_a_checkpoint(tool, kind, run, tmp_path):
    if tool.endswith('pvtv2_to_linglo.py'):
        pytest.importorskip('timm')
    if tool.endswith('export_onnx.py'):
        pytest.importorskip('onnxscript')
        pytest.importorskip('onnxruntime')
    file = write_strangers_file(kind, tmp_path / 'bad.pth', tmp_path / 'written')
    with pytest.raises(CheckpointError, match=r'bad\.pth. cannot be read safely: .*--trust-'):
        run(tool, file)
    assert not (tmp_path / 'written').exists()
    assert not (tmp_path / 'out').exists()


def test_a_changed_dtype_stays_as_it_is(tmp_path):
    strangers.save_pickle(tmp_path / 'dtype.pth', strangers.dtype_exploit())
    dtype = load_checkpoint_file(str(tmp_path / 'dtype.pth'))['dtype']
    assert dtype is np.dtype('f8')
    assert not dtype.hasobject
    assert not np.dtype('f8').hasobject


def test_trust_is_a_way_to_a_safe_file(run, tmp_path):
    state = dict(weight=torch.rand(2), args=None)
    content = dict(state_dict=state, args=strangers.WritesFile(tmp_path / 'written'))
    torch.save(content, tmp_path / 'odd.pth')
    run('model_converters/publish_model.py', tmp_path / 'odd.pth', '--trust-checkpoint')
    assert (tmp_path / 'written').exists()  # that is what trusting means
    (published,) = (tmp_path / 'out').iterdir()
    loaded = load_checkpoint_file(str(published))
    assert list(loaded['state_dict']) == ['weight']
    assert torch.equal(loaded['state_dict']['weight'], state['weight'])


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize('kind', ['pickle', 'getattr_exploit', 'builtins_exploit'])
def test_mmengine_reads_safely_in_our_tools(kind, tmp_path):
    """That is how Runner loads and resumes, and how other backbones load `Pretrained` weights."""
    file = write_strangers_file(kind, tmp_path / 'bad.pth', tmp_path / 'written')
    use_in_mmengine()
    with pytest.raises(CheckpointError, match='read safely'):
        load_checkpoint(Holder(), str(file))
    with pytest.raises(Exception, match=r'weights_only|len\(\)|read safely'):
        torch.load(file, weights_only=False)  # as mmengine does after its own failure
    assert not (tmp_path / 'written').exists()


def test_mmengine_trusts_if_told_so(tmp_path):
    file = write_strangers_file('pickle', tmp_path / 'odd.pth', tmp_path / 'written')
    use_in_mmengine(trust=True)
    model = Holder()
    loaded = load_checkpoint(model, str(file))
    assert (tmp_path / 'written').exists()
    assert torch.equal(model.weight, loaded['state_dict']['weight'])


def test_mmengine_gets_no_python_to_resume_from(tmp_path):
    """Runner.resume runs the text meta['config'], which mmengine itself does not write."""
    meta = dict(epoch=1, config=f'open({str(tmp_path / "written")!r}, "w").close()')
    torch.save(dict(meta=meta, state_dict=dict(weight=torch.ones(2))), tmp_path / 'text.pth')
    use_in_mmengine()
    loaded = load_checkpoint(Holder(), str(tmp_path / 'text.pth'))
    assert loaded['meta'] == dict(epoch=1)


def test_mmengine_does_not_load_nan(tmp_path):
    torch.save(dict(state_dict=dict(weight=torch.tensor([1.0, torch.nan]))), tmp_path / 'nan.pth')
    use_in_mmengine()
    model = Holder()
    with pytest.raises(CheckpointError, match=r'weight \(1 of 2 numbers\)'):
        load_checkpoint(model, str(tmp_path / 'nan.pth'))
    assert torch.equal(model.weight, torch.zeros(2))


@pytest.mark.slow
def test_training_runs_no_code_from_checkpoints(shapes, tmp_path):
    """Through the command line, with the data in place."""
    file = write_strangers_file('getattr_exploit', tmp_path / 'bad.pth', tmp_path / 'written')
    data = [
        f'{loader}_dataloader.dataset.data_root={shapes}/imagenet' for loader in ('train', 'val')
    ]
    for way in (['--resume', file], ['--cfg-options', f'load_from={file}']):
        words = [*way, *data] if '--cfg-options' in way else [*way, '--cfg-options', *data]
        result = run_tool(
            'tools/train.py', CLASSIFIER, '--work-dir', tmp_path / 'work', *words, check=False
        )
        assert result.returncode == 1, result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith('error: '), result.stderr
        assert 'cannot be read safely' in last
        assert not (tmp_path / 'written').exists()


@pytest.fixture(scope='module')
def classifier_weights():
    return build_model(Config.fromfile(CLASSIFIER)).state_dict()


def nan_weights(weights):
    key = 'backbone.stages.1.blocks.0.ffn.fc1.weight'
    return {**weights, key: torch.full_like(weights[key], torch.nan)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: {k: v for k, v in w.items() if 'head' not in k}, r'missing: head\.fc\.weight'),
        (lambda w: {**w, 'extra.weight': torch.rand(1)}, r'unexpected: extra\.weight'),
        (lambda w: {f'net.{k}': v for k, v in w.items()}, r"name the prefix 'net\.', or remove"),
        (nan_weights, r'fc1\.weight \(32768 of 32768 numbers\).*earlier checkpoint'),
        (lambda w: {k: v.to('meta') for k, v in w.items()}, 'without values: backbone'),
        (lambda _: {}, 'tensors missing'),
        (lambda w: {0: 1, **dict.fromkeys(w, 'text')}, 'tensors missing'),
    ],
    ids=['missing', 'extra', 'prefix', 'nan', 'meta', 'empty', 'texts'],
)
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_weights_that_do_not_fit(change, message, suffix, run, classifier_weights, tmp_path):
    weights, file = change(classifier_weights), tmp_path / f'weights.{suffix}'
    if suffix == 'safetensors':
        safetensors = pytest.importorskip('safetensors.torch')
        if not all(isinstance(v, torch.Tensor) and not v.is_meta for v in weights.values()):
            pytest.skip('the format cannot hold it')
        safetensors.save_file({key: value.contiguous() for key, value in weights.items()}, file)
    else:
        torch.save(dict(state_dict=weights), file)
    with pytest.raises(CheckpointError, match=message):
        run('model_converters/reparameterize_model.py', file)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'names',
    [
        ('patch_embed1.proj.weight', 'block1.0.attn.kv.weight', 'head.bias'),
        (
            'layers.0.0.projection.weight',
            'layers.0.1.0.attn.attn.in_proj_weight',
            'layers.0.1.0.ffn.layers.0.weight',
        ),
    ],
)
def test_numbers_in_place_of_matrices_are_no_pvtv2(names):
    pytest.importorskip('timm')
    weights = {name: torch.tensor(1.0) for name in names}
    with pytest.raises(CheckpointError, match="'file' does not fit this model"):
        load_pvtv2(weights, LinGlo(arch='b0').arch, 'file')


def place_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path.with_name('x.png')), np.full((32, 32, 3), 99, np.uint8))
    path.with_name('x.png').rename(path)


def all_files(folder: Path) -> set:
    return {path for path in folder.rglob('*') if not path.is_dir()}


@pytest.mark.parametrize('name', HOSTILE)
@pytest.mark.parametrize('scope', CONFIGS)
def test_drawings_of_test_py_stay_in_their_folder(scope, name, tmp_path):
    """For names of pictures from annotation files, which the toolboxes join to their folder."""
    spec = importlib.util.spec_from_file_location('test_tool', ROOT / 'tools/test.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    root = tmp_path / 'data/train/pictures'
    root.mkdir(parents=True)
    (root / 'a').mkdir()
    picture = f'{root}/{name}'
    place_picture(Path(picture))
    before = all_files(tmp_path)

    cfg = load_config(str(CONFIGS[scope]))
    show_dir = tmp_path / 'deep/folder/show'
    args = SimpleNamespace(show=False, wait_time=0, show_dir=str(show_dir), config='c')
    tool.enable_visualization(cfg, args)
    with VISUALIZERS.switch_scope_and_registry(scope):
        visualizer = VISUALIZERS.build({**cfg.visualizer, 'save_dir': str(show_dir), 'name': name})
    visualizer.dataset_meta = dict(classes=('a', 'b'), palette=[(0, 0, 0), (255, 0, 0)])
    with HOOKS.switch_scope_and_registry(scope):
        hook = HOOKS.build(cfg.default_hooks.visualization)
    hook._visualizer = visualizer
    sample = make_sample(scope, picture)
    runner = SimpleNamespace(work_dir=str(tmp_path / 'deep/work'), timestamp='now', iter=0)
    hook.after_test_iter(runner, 0, dict(inputs=torch.zeros(1, 3, 32, 32)), [sample])

    written = all_files(tmp_path) - before
    assert written
    assert all(show_dir in path.resolve().parents for path in written), written


def make_sample(scope, picture):
    meta = dict(img_path=picture, ori_shape=(32, 32), img_shape=(32, 32))
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return DataSample(metainfo=meta).set_pred_score(torch.tensor([0.5, 0.5])).set_pred_label(0)
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        boxes = InstanceData(
            bboxes=torch.tensor([[1.0, 1, 9, 9]]), scores=torch.ones(1), labels=torch.zeros(1).int()
        )
        return DetDataSample(metainfo=meta, pred_instances=boxes)
    from mmseg.structures import SegDataSample

    labels = PixelData(data=torch.zeros(1, 32, 32, dtype=torch.int64))
    return SegDataSample(metainfo=meta, pred_sem_seg=labels)


@pytest.mark.parametrize('name', HOSTILE)
def test_label_images_of_test_py_stay_in_their_folder(name, tmp_path):
    cfg = load_config(str(CONFIGS['mmseg']))
    out = tmp_path / 'deep/labels'
    evaluator = {**cfg.test_evaluator, 'output_dir': str(out), 'keep_results': True}
    with METRICS.switch_scope_and_registry('mmseg'):
        metric = METRICS.build(evaluator)
    metric.dataset_meta = dict(classes=('a', 'b'))
    labels = dict(data=torch.zeros(1, 32, 32, dtype=torch.int64))
    metric.process(
        {}, [dict(pred_sem_seg=labels, gt_sem_seg=labels, img_path=f'{tmp_path}/in/{name}')]
    )
    (written,) = all_files(tmp_path)
    assert written.parent == out


def test_sheets_of_vis_saliency_stay_in_their_folder(tmp_path):
    spec = importlib.util.spec_from_file_location(
        'vis_saliency', ROOT / 'tools/visualization/vis_saliency.py'
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sheets = tool.name_sheets([f'in/{name}' for name in HOSTILE], tmp_path / 'out')
    assert len(set(sheets.values())) == len(HOSTILE)
    assert all(sheet.resolve().parent == tmp_path / 'out' for sheet in sheets.values())


def test_results_of_infer_stay_in_their_folder(run, classifier_weights, tmp_path, monkeypatch):
    """The names that a folder can really have."""
    names = {Path(name).name for name in HOSTILE if not Path(name).name.startswith('.')}
    for name in names:
        place_picture(tmp_path / 'in' / name)
    torch.save(dict(state_dict=classifier_weights), tmp_path / 'weights.pth')
    monkeypatch.setitem(
        TOOLS,
        'infer.py',
        [CLASSIFIER, 'CHECKPOINT', tmp_path / 'in', '--out-dir', 'OUT', '--device', 'cpu'],
    )
    before = all_files(tmp_path)
    run('infer.py', tmp_path / 'weights.pth')
    written = all_files(tmp_path) - before - {tmp_path / 'picture.png'}
    folders = {kind: tmp_path / 'out' / kind for kind in ('vis', 'preds')}
    expected = {folders['vis'] / name for name in names}
    assert written == expected | {folders['preds'] / f'{name}.json' for name in names}


def test_no_product_code_evaluates_text():
    """Of data files; config files are Python and go through mmengine's Config."""
    for source in [*(ROOT / 'mmlinglo').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]:
        lines = source.read_text().splitlines()
        for forbidden in (' eval(', ' exec(', 'pickle.load', 'yaml.load(', 'shell=True'):
            assert not any(forbidden in f' {line}' for line in lines), (source, forbidden)


def test_pretrained_weights_are_read_safely(tmp_path):
    file = write_strangers_file('getattr_exploit', tmp_path / 'bad.pth', tmp_path / 'written')
    model = LinGlo(arch=TINY_ARCH, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    with pytest.raises(CheckpointError, match='read safely'):
        model.init_weights()
    assert not (tmp_path / 'written').exists()
