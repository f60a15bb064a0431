# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import hashlib
import re
from collections import OrderedDict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import TINY_ARCH, randomize_norms_
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import ExponentialMovingAverage, PretrainedInit
from torch.optim.swa_utils import AveragedModel

from mmlinglo import LinGlo
from mmlinglo.utils import CheckpointError, load_checkpoint_file, load_model_weights


def source_backbone(**kwargs):
    model = LinGlo(arch=TINY_ARCH, **{'out_indices': (3,), **kwargs})
    model.init_weights()
    return randomize_norms_(model)


def pretrained(path, **kwargs):
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    return LinGlo(arch=TINY_ARCH, **{'init_cfg': init_cfg, **kwargs})


def classifier_weights(backbone, prefix='backbone.'):
    weights = {prefix + key: value for key, value in backbone.state_dict().items()}
    return OrderedDict(weights, **{'head.fc.weight': torch.rand(5, 32)})


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_instance('test_checkpoint')
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: weights,
        lambda weights: {'state_dict': weights, 'meta': {'epoch': 3}},
        lambda weights: {'model': weights},
        lambda weights: {'state_dict': {f'module.{k}': v for k, v in weights.items()}},
    ],
)
def test_a_detector_gets_every_shared_tensor(tmp_path, wrap, log):
    source = source_backbone()
    torch.save(wrap(classifier_weights(source)), tmp_path / 'cls.pth')
    model = pretrained(tmp_path / 'cls.pth', out_indices=(1, 2, 3))
    model.init_weights()
    expected = source.state_dict()
    loaded = model.state_dict()
    assert set(loaded) - set(expected) == {
        f'norm{i}.{name}' for i in (1, 2) for name in ('weight', 'bias')
    }
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    assert torch.equal(model.norm1.weight, torch.ones(16))
    total = len(loaded)
    assert f'loaded {total - 4} of {total} backbone tensors' in log.text
    assert 'norm1.weight' in log.text


def test_a_bare_backbone_and_a_shallower_model(tmp_path):
    source = source_backbone()
    torch.save(source.state_dict(), tmp_path / 'backbone.pth')
    model = pretrained(tmp_path / 'backbone.pth', out_indices=(1,))
    model.init_weights()
    key = 'stages.1.blocks.0.attn.key.weight'
    assert torch.equal(model.state_dict()[key], source.state_dict()[key])


def test_a_file_that_matches_nothing_is_an_error(tmp_path):
    torch.save({'state_dict': {'backbone.conv1.weight': torch.rand(3)}}, tmp_path / 'other.pth')
    model = pretrained(tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'tensors missing: patch_embed\.conv\.weight'):
        model.init_weights()


def test_one_missing_or_misshapen_tensor_is_an_error(tmp_path):
    weights = classifier_weights(source_backbone())
    missing = weights.pop('backbone.stages.2.blocks.0.attn.saliency')
    torch.save(weights, tmp_path / 'missing.pth')
    with pytest.raises(CheckpointError, match=r'1 tensors missing: .*saliency'):
        pretrained(tmp_path / 'missing.pth').init_weights()
    weights['backbone.stages.2.blocks.0.attn.saliency'] = missing.flatten()
    torch.save(weights, tmp_path / 'shape.pth')
    with pytest.raises(CheckpointError, match=r'\(24,\) instead of \(3, 8\)'):
        pretrained(tmp_path / 'shape.pth').init_weights()


def test_deployed_weights_are_recognised(tmp_path):
    source = source_backbone().eval()
    source.switch_to_deploy()
    torch.save(classifier_weights(source), tmp_path / 'deployed.pth')
    with pytest.raises(CheckpointError, match='build the model with deploy=True'):
        pretrained(tmp_path / 'deployed.pth').init_weights()
    pretrained(tmp_path / 'deployed.pth', deploy=True).init_weights()
    torch.save(classifier_weights(source_backbone()), tmp_path / 'training.pth')
    with pytest.raises(CheckpointError, match=r'convert the file with reparameterize_model\.py'):
        pretrained(tmp_path / 'training.pth', deploy=True).init_weights()
    for content in ({}, {'backbone.conv1.weight': torch.rand(3)}):
        torch.save(content, tmp_path / 'other.pth')
        for deploy in (False, True):
            with pytest.raises(CheckpointError, match=r'missing: .* and \d+ more$'):
                pretrained(tmp_path / 'other.pth', deploy=deploy).init_weights()


@pytest.mark.parametrize(
    ('source', 'own', 'named'),
    [
        (dict(arch={**TINY_ARCH, 'depths': (2, 2, 1, 1)}), dict(), r'stages\.0\.blocks\.1\.'),
        (dict(), dict(pos_encoding='R-CPE'), r'pos_encoding\.branches\.1\.conv'),
        (dict(), dict(qkv_bias=False), r'attn\.key\.bias'),
    ],
    ids=['deeper', 'pos_encoding', 'qkv_bias'],
)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_a_part_of_another_network_is_an_error(tmp_path, source, own, named, prefix):
    weights = LinGlo(**{'arch': TINY_ARCH, **source}).state_dict()
    torch.save({prefix + key: value for key, value in weights.items()}, tmp_path / 'other.pth')
    model = pretrained(tmp_path / 'other.pth', **own)
    with pytest.raises(CheckpointError, match=rf'tensors unexpected: .*{named}.* arch, pos_enc'):
        model.init_weights()


@pytest.mark.parametrize(
    'init_cfg',
    ['a.pth', 5, {}, ['a.pth'], dict(checkpoint='a.pth'), dict(type='Pretrained'),
     dict(type=PretrainedInit, checkpoint=None)],
    ids=str,
)  # fmt: skip
def test_what_no_init_cfg_can_be(init_cfg):
    with pytest.raises(TypeError, match=rf'must be None, a dict.* got {re.escape(repr(init_cfg))}'):
        LinGlo(arch=TINY_ARCH, init_cfg=init_cfg)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        pretrained(tmp_path / 'nowhere.pth').init_weights()
    message = str(error.value)
    assert str(tmp_path / 'nowhere.pth') in message
    assert 'dist_train.sh configs/imagenet/' in message
    assert 'model.backbone.init_cfg.checkpoint=FILE' in message
    assert 'model.backbone.init_cfg=None' in message


class Malicious:
    def __reduce__(self):
        return print, ('this must not run',)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    torch.save({'state_dict': {}, 'meta': Malicious()}, tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match='read safely'):
        load_checkpoint_file(str(tmp_path / 'bad.pth'))
    assert capsys.readouterr().out == ''


def test_what_a_runner_writes_can_be_read(tmp_path):
    buffer = HistoryBuffer()
    buffer.update(0.5)
    torch.save({'state_dict': {}, 'message_hub': {'loss': buffer}}, tmp_path / 'runner.pth')
    loaded = load_checkpoint_file(str(tmp_path / 'runner.pth'))
    assert loaded['message_hub']['loss'].current() == 0.5


@pytest.mark.parametrize(
    'content', [b'', b'no checkpoint', b'PK\x03\x04 cut off', b'hello', b'version https://git-lfs']
)
def test_a_damaged_file_is_an_error(tmp_path, content):
    (tmp_path / 'damaged.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=r'damaged\.pth. is damaged or not a .*: [a-zA-Z]{4}'):
        load_checkpoint_file(str(tmp_path / 'damaged.pth'))


def test_whole_models_are_strict():
    model = source_backbone()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {**source_backbone().state_dict(), 'extra': torch.rand(1)}
    with pytest.raises(
        CheckpointError, match=r"'file' does not fit .* 1 tensors unexpected: extra"
    ):
        load_model_weights(model, {'state_dict': weights}, 'file')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    del weights['extra']
    load_model_weights(model, {'state_dict': weights}, 'file')
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_the_class_as_type_is_as_strict(tmp_path):
    """As pure Python configs write it; mmengine's own loader would only warn."""
    weights = classifier_weights(source_backbone())
    del weights['backbone.stages.0.blocks.0.attn.saliency']
    torch.save(weights, tmp_path / 'cls.pth')
    init_cfg = dict(type=PretrainedInit, checkpoint=str(tmp_path / 'cls.pth'), prefix='backbone.')
    with pytest.raises(CheckpointError, match='saliency'):
        LinGlo(arch=TINY_ARCH, init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize('zipped', [True, False])
def test_a_file_cut_off_anywhere_is_an_error(tmp_path, zipped):
    file = tmp_path / 'cut.pth'
    torch.save(
        {'state_dict': {'weight': torch.rand(50)}}, file, _use_new_zipfile_serialization=zipped
    )
    content = file.read_bytes()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r'cut\.pth'):
            load_checkpoint_file(str(file))


@pytest.mark.parametrize(
    'metadata', ['3', '[]', '{', '[' * 100_000, '"' + 'x' * 9], ids=lambda text: text[:3]
)
def test_safetensors_with_odd_metadata(tmp_path, metadata):
    save_file = pytest.importorskip('safetensors.torch').save_file
    file = str(tmp_path / 'odd.safetensors')
    save_file({'weight': torch.rand(2)}, file, metadata=dict(meta=metadata))
    with pytest.raises(CheckpointError, match=r'odd\.safetensors'):
        load_checkpoint_file(file)


def test_what_a_file_may_hold_besides_tensors(tmp_path):
    """Numbers of numpy of either major version, and arrays of them; no texts or objects."""
    content = dict(
        score=np.float64(3.5),
        seed=np.uint32(2**31),
        flag=np.bool_(True),
        rows=np.arange(6, dtype=np.float32).reshape(2, 3),
        columns=np.asfortranarray(np.arange(6).reshape(2, 3)),
    )
    torch.save(content, tmp_path / 'numbers.pth')
    loaded = load_checkpoint_file(str(tmp_path / 'numbers.pth'))
    for key, value in content.items():
        assert type(loaded[key]) is type(value), key
        assert loaded[key].dtype == value.dtype, key
        np.testing.assert_array_equal(loaded[key], value)
    for array in (np.array(['text']), np.array([None]), np.zeros(2, 'f4,f4')):
        torch.save(dict(array=array), tmp_path / 'other.pth')
        with pytest.raises(CheckpointError, match=r'read safely: numpy\.dtype of something other'):
            load_checkpoint_file(str(tmp_path / 'other.pth'))


def test_diverged_weights_are_refused(tmp_path):
    weights = classifier_weights(source_backbone())
    key = 'backbone.stages.1.blocks.0.ffn.fc1.bias'
    for value in (torch.nan, torch.inf):
        weights[key] = torch.zeros(32)
        weights[key][3:5] = value
        torch.save(weights, tmp_path / 'diverged.pth')
        model = pretrained(tmp_path / 'diverged.pth')
        with pytest.raises(CheckpointError, match=r'1 tensors .*fc1\.bias \(2 of 32 numbers\)'):
            model.init_weights()
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_infinities_that_a_model_has_itself_are_loaded():
    model = torch.nn.Linear(2, 2)
    model.register_buffer('mask', torch.tensor([0.0, -torch.inf]))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    load_model_weights(model, {'state_dict': weights}, 'file')
    weights['bias'][0] = torch.inf
    with pytest.raises(CheckpointError, match=r'bias \(1 of 2 numbers\)\. Its training'):
        load_model_weights(model, {'state_dict': weights}, 'file')


def test_another_prefix_is_named(tmp_path):
    weights = classifier_weights(source_backbone(), prefix='net.encoder.')
    torch.save(weights, tmp_path / 'cls.pth')
    with pytest.raises(CheckpointError, match=r"name the prefix 'net\.encoder\.'"):
        pretrained(tmp_path / 'cls.pth').init_weights()
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'cls.pth'), prefix='net.encoder.')
    model = LinGlo(arch=TINY_ARCH, out_indices=(3,), init_cfg=init_cfg)
    model.init_weights()
    key = 'norm3.weight'
    assert torch.equal(model.state_dict()[key], weights[f'net.encoder.{key}'])


@pytest.mark.parametrize(
    ('names', 'there'),
    [
        ('', "''"),
        ('student.backbone.', r"'student\.backbone\.'"),
        ('layer1.', r"'head\.', 'layer1\.'"),
    ],
)
def test_a_prefix_that_the_file_has_not(tmp_path, names, there):
    weights = classifier_weights(source_backbone(), prefix=names)
    if names == 'layer1.':
        weights = {key.replace('patch_embed', 'stem'): value for key, value in weights.items()}
    torch.save(weights, tmp_path / 'cls.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'cls.pth'), prefix='teacher')
    with pytest.raises(
        CheckpointError, match=rf"no tensors with the prefix 'teacher\.'.* {there}$"
    ):
        LinGlo(arch=TINY_ARCH, init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize('odd', ['meta', 'sparse'])
def test_tensors_of_other_kinds_are_named(odd):
    model = torch.nn.Linear(2, 2)
    weights = dict(model.state_dict())
    weights['weight'] = weights['weight'].to('meta') if odd == 'meta' else torch.eye(2).to_sparse()
    with pytest.raises(CheckpointError, match='1 tensors sparse, quantized or without values'):
        load_model_weights(model, {'state_dict': weights}, 'file')


def test_a_url_is_read_safely_and_kept(tmp_path, monkeypatch):
    served = tmp_path / 'served'
    served.mkdir()
    torch.save({'state_dict': {'weight': torch.ones(2)}}, served / 'good.pth')
    torch.save({'state_dict': {}, 'meta': Malicious()}, served / 'bad.pth')
    (served / 'other').mkdir()
    torch.save({'state_dict': {'weight': torch.zeros(2)}}, served / 'other/good.pth')
    content = (served / 'good.pth').read_bytes()
    digits = hashlib.sha256(content).hexdigest()[:8]
    for name in (f'right-{digits}', 'wrong-0123abcd', 'date-20260131'):
        (served / f'{name}.pth').write_bytes(content)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        loaded = load_checkpoint_file(f'{address}/good.pth')
        with pytest.raises(CheckpointError, match='read safely'):
            load_checkpoint_file(f'{address}/bad.pth')
        with pytest.raises(CheckpointError, match=r'absent\.pth. cannot be read: HTTP Error 404'):
            load_checkpoint_file(f'{address}/absent.pth')
        other = load_checkpoint_file(f'{address}/other/good.pth')
        for name in (f'right-{digits}', 'date-20260131'):
            load_checkpoint_file(f'{address}/{name}.pth')
        for _ in range(2):  # nothing wrong is kept
            with pytest.raises(
                CheckpointError, match=r'wrong-0123abcd\.pth. was damaged on the way'
            ):
                load_checkpoint_file(f'{address}/wrong-0123abcd.pth')
        server.shutdown()
    assert torch.equal(other['state_dict']['weight'], torch.zeros(2))
    assert torch.equal(loaded['state_dict']['weight'], torch.ones(2))
    assert torch.equal(
        load_checkpoint_file(f'{address}/good.pth')['state_dict']['weight'], torch.ones(2)
    )


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel names its model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ('wrap', 'named'),
    [
        (torch.compile, 'torch.compile'),
        (Wrapped, 'DistributedDataParallel or EMA'),
        (lambda model: Wrapped(torch.compile(model)), 'EMA and torch.compile'),
        (lambda model: torch.compile(Wrapped(model)), 'EMA and torch.compile'),
        (lambda model: Wrapped(Wrapped(model)), 'EMA'),
        (AveragedModel, 'EMA'),
        (ExponentialMovingAverage, 'EMA'),
        (lambda model: AveragedModel(Wrapped(torch.compile(model))), 'EMA and torch.compile'),
        (lambda model: torch.compile(AveragedModel(model)), 'EMA and torch.compile'),
    ],
)
def test_prefixes_of_wrappers_are_removed(wrap, named, log, tmp_path):
    model = torch.nn.Sequential(OrderedDict(backbone=source_backbone(), head=torch.nn.Linear(2, 2)))
    file = tmp_path / 'wrapped.pth'
    torch.save({'state_dict': wrap(model).state_dict()}, file)

    twin = torch.nn.Sequential(OrderedDict(backbone=source_backbone(), head=torch.nn.Linear(2, 2)))
    load_model_weights(twin, load_checkpoint_file(str(file)), 'file')
    backbone = pretrained(file, out_indices=(3,))
    backbone.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key
    assert f'prefixes of {named}' in log.text or f'{named} removed' in log.text


@pytest.mark.parametrize('wrap', [torch.compile, Wrapped])
def test_a_wrapped_backbone_in_a_plain_model(wrap, tmp_path):
    source = source_backbone()
    torch.save(torch.nn.ModuleDict(dict(backbone=wrap(source))).state_dict(), tmp_path / 'w.pth')
    model = pretrained(tmp_path / 'w.pth', out_indices=(3,))
    model.init_weights()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())


def test_what_is_missing_behind_a_wrapper_is_missing():
    model = torch.nn.Linear(2, 2)
    weights = torch.compile(model).state_dict()
    del weights['_orig_mod.bias']
    with pytest.raises(CheckpointError, match='1 tensors missing: bias'):
        load_model_weights(model, {'state_dict': weights}, 'file')


def test_names_that_only_look_like_wrappers_stay():
    model = torch.nn.ModuleDict(dict(module=torch.nn.Linear(2, 2)))
    model.weight = torch.nn.Parameter(torch.zeros(2, 2))
    model.bias = torch.nn.Parameter(torch.zeros(2))
    load_model_weights(model, {'state_dict': model.state_dict()}, 'file')
