# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import hashlib
import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT, TINY_ARCH, randomize_norms_, run_tool
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import load_checkpoint

from mmlinglo import LinGlo, __version__
from mmlinglo.utils import CheckpointError, load_checkpoint_file
from mmlinglo.utils.cli import UsageError
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.deploy import switch_to_deploy as deploy

PUBLISH = 'tools/model_converters/publish_model.py'
CONFIG = 'configs/quickstart/linglo-b0_2xb16-8e_shapes.py'
CLASSES = ('circle', 'square', 'triangle', 'star')


class Model(torch.nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = randomize_norms_(LinGlo(arch=TINY_ARCH, **kwargs))


def training_checkpoint(model) -> dict:
    """What a Runner writes, with an optimizer that has made a step."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    history = HistoryBuffer()
    history.update(0.5)
    meta = dict(epoch=3, iter=60, cfg="x = 'text'\n", dataset_meta=dict(classes=CLASSES))
    return dict(
        meta=meta,
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[{'last_step': 60}],
        message_hub=dict(log_scalars={'loss': history}),
    )


@pytest.fixture
def publish(monkeypatch):
    """Run the tool in this process; gives the names of the files in the output's folder."""
    spec = importlib.util.spec_from_file_location('publish_model', ROOT / PUBLISH)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(source, out, *args):
        monkeypatch.setattr(sys, 'argv', [PUBLISH, str(source), str(out), *map(str, args)])
        tool.main()
        return sorted(out.parent.iterdir())

    return call


@pytest.fixture
def source(tmp_path):
    torch.save(training_checkpoint(Model()), tmp_path / 'epoch_3.pth')
    return tmp_path / 'epoch_3.pth'


def assert_same(loaded, expected):
    assert set(loaded) == set(expected)
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key


def test_small_safe_and_named_by_its_hash(publish, source, tmp_path, capsys):
    (path,) = publish(source, tmp_path / 'out/linglo-b0_shapes.pth')
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert path.name == f'linglo-b0_shapes-{digits}.pth'
    assert torch.hub.HASH_REGEX.search(path.name)[1] == digits  # what check_hash=True compares
    loaded = torch.load(path, weights_only=True)  # no class is allowed beside torch's own
    weights = torch.load(source, weights_only=False)['state_dict']
    assert set(loaded) == {'meta', 'state_dict'}
    assert_same(loaded['state_dict'], weights)
    assert loaded['meta'] == dict(
        epoch=3,
        iter=60,
        cfg="x = 'text'\n",
        dataset_meta=dict(classes=CLASSES),
        mmlinglo_version=__version__,
    )
    size = sum(value.numel() * value.element_size() for value in weights.values())
    assert path.stat().st_size < 1.6 * size < source.stat().st_size
    printed = capsys.readouterr().out
    assert 'left out: optimizer, param_schedulers, message_hub' in printed
    assert 'warning' not in printed


def test_the_same_weights_give_the_same_file(publish, source, tmp_path):
    names = [
        publish(source, tmp_path / folder / f'a{suffix}', *args)[0].name
        for suffix, args in (('.pth', ()), ('.safetensors', ('--safetensors',)))
        for folder in (f'first{suffix}', f'second{suffix}')
    ]
    assert names[0] == names[1] != names[2] == names[3]


def test_a_part_of_a_large_tensor_is_stored_alone(publish, tmp_path):
    torch.save({'state_dict': {'weight': torch.rand(1000, 1000)[:2]}}, tmp_path / 'x.pth')
    (path,) = publish(tmp_path / 'x.pth', tmp_path / 'out/x.pth')
    assert path.stat().st_size < 20_000


def test_the_averages_of_an_ema_are_published(publish, tmp_path, capsys):
    """EMAHook itself puts them into ``state_dict`` and the raw weights into ``ema_state_dict``."""
    model = Model()
    hook = EMAHook()
    hook.src_model, hook.ema_model = model, ExponentialMovingAverage(model, momentum=0.5)
    hook.ema_model.update_parameters(model)  # the first update copies
    raw = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    hook.ema_model.update_parameters(model)
    checkpoint = training_checkpoint(model)
    checkpoint['state_dict'] = {k: v.clone() for k, v in model.state_dict().items()}
    hook.before_save_checkpoint(None, checkpoint)
    torch.save(checkpoint, tmp_path / 'ema.pth')
    (path,) = publish(tmp_path / 'ema.pth', tmp_path / 'out/ema.pth')
    key = 'backbone.stages.0.blocks.0.attn.key.weight'
    loaded = torch.load(path, weights_only=True)
    assert set(loaded) == {'meta', 'state_dict'}
    torch.testing.assert_close(loaded['state_dict'][key], raw[key] + 0.5)
    assert 'averages' in capsys.readouterr().out


def test_safetensors(publish, source, tmp_path):
    safetensors = pytest.importorskip('safetensors')
    (path,) = publish(source, tmp_path / 'out/a.safetensors', '--safetensors')
    weights = torch.load(source, weights_only=False)['state_dict']
    with safetensors.safe_open(path, framework='pt') as file:
        assert_same({key: file.get_tensor(key) for key in file.keys()}, weights)
        assert json.loads(file.metadata()['meta'])['dataset_meta'] == dict(classes=[*CLASSES])
    loaded = load_checkpoint_file(str(path))
    assert_same(loaded['state_dict'], weights)
    assert loaded['meta']['epoch'] == 3
    assert loaded['meta']['mmlinglo_version'] == __version__


def test_safetensors_of_others_and_damaged_ones(tmp_path):
    torch_io = pytest.importorskip('safetensors.torch')
    torch_io.save_file({'a': torch.ones(2)}, tmp_path / 'others.safetensors')
    loaded = load_checkpoint_file(str(tmp_path / 'others.safetensors'))
    assert loaded['meta'] == {}
    assert torch.equal(loaded['state_dict']['a'], torch.ones(2))
    for content in (b'', b'PK\x03\x04', (tmp_path / 'others.safetensors').read_bytes()[:-3]):
        (tmp_path / 'bad.safetensors').write_bytes(content)
        with pytest.raises(CheckpointError, match=r'bad\.safetensors.* is damaged'):
            load_checkpoint_file(str(tmp_path / 'bad.safetensors'))
    torch_io.save_file({'a': torch.ones(2)}, tmp_path / 'bad.safetensors', {'meta': 'no JSON'})
    with pytest.raises(CheckpointError, match='is damaged'):
        load_checkpoint_file(str(tmp_path / 'bad.safetensors'))


def test_without_the_package_safetensors(publish, source, tmp_path, monkeypatch):
    for name in ('safetensors', 'safetensors.torch'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        publish(source, tmp_path / 'out/a.safetensors', '--safetensors')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('args', [(), ('--safetensors',)], ids=['pth', 'safetensors'])
def test_a_detector_starts_from_a_published_file(publish, source, tmp_path, args):
    name = 'a.safetensors' if args else 'a.pth'
    (path,) = publish(source, tmp_path / 'out' / name, *args)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    backbone = LinGlo(arch=TINY_ARCH, init_cfg=init_cfg)
    backbone.init_weights()
    weights = torch.load(source, weights_only=False)['state_dict']
    assert_same({f'backbone.{k}': v for k, v in backbone.state_dict().items()}, weights)


def test_mmengine_loads_a_published_file(publish, source, tmp_path):
    (path,) = publish(source, tmp_path / 'out/a.pth')
    model = Model()
    loaded = load_checkpoint(model, str(path), map_location='cpu', strict=True)
    assert loaded['meta']['dataset_meta']['classes'] == CLASSES
    assert_same(model.state_dict(), torch.load(source, weights_only=False)['state_dict'])


def test_with_a_config(publish, tmp_path, capsys):
    from mmengine.config import Config

    model = build_model(Config.fromfile(ROOT / CONFIG)).eval()
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    (path,) = publish(tmp_path / 'plain.pth', tmp_path / 'out/a.pth', '--config', ROOT / CONFIG)
    loaded = torch.load(path, weights_only=True)
    assert Config.fromstring(loaded['meta']['cfg'], '.py').model.backbone.arch == 'b0'
    assert 'warning: the checkpoint says nothing about dataset_meta' in capsys.readouterr().out

    deploy(model)
    torch.save(model.state_dict(), tmp_path / 'deployed.pth')
    out = tmp_path / 'deployed/a.pth'
    with pytest.raises(CheckpointError, match='does not fit this model'):
        publish(tmp_path / 'deployed.pth', out, '--config', ROOT / CONFIG)
    assert not out.parent.exists()
    options = ('--config', ROOT / CONFIG, '--cfg-options', 'model.backbone.deploy=True')
    (path,) = publish(tmp_path / 'deployed.pth', out, *options)
    cfg = Config.fromstring(torch.load(path, weights_only=True)['meta']['cfg'], '.py')
    assert_same(torch.load(path, weights_only=True)['state_dict'], model.state_dict())
    assert cfg.model.backbone.deploy is True


def test_what_cannot_be_published(publish, source, tmp_path):
    out = tmp_path / 'out/a.pth'
    with pytest.raises(UsageError, match=r'without --safetensors, .* must end with \.pth: .*a\.pt'):
        publish(source, tmp_path / 'out/a.pt')
    with pytest.raises(UsageError, match=r'with --safetensors, .* must end with \.safetensors'):
        publish(source, out, '--safetensors')
    with pytest.raises(UsageError, match='need --config'):
        publish(source, out, '--cfg-options', 'a=1')
    torch.save({'meta': {}}, tmp_path / 'empty.pth')
    with pytest.raises(CheckpointError, match='holds no weights'):
        publish(tmp_path / 'empty.pth', out)
    history = training_checkpoint(Model())['message_hub']['log_scalars']['loss']
    content = dict(meta=dict(log=[history]), state_dict={'a': torch.ones(1)})
    torch.save(content, tmp_path / 'object.pth')
    with pytest.raises(CheckpointError, match=r'meta\.log\[0\] .* is a HistoryBuffer'):
        publish(tmp_path / 'object.pth', out)
    assert not out.parent.exists()


@pytest.mark.slow
def test_command_line(source, tmp_path):
    assert 'tensors' in run_tool(PUBLISH, source, tmp_path / 'out/a.pth').stdout
    result = run_tool(PUBLISH, tmp_path / 'no.pth', tmp_path / 'b/a.pth', check=False)
    assert result.stderr.splitlines()[-1] == f"error: checkpoint '{tmp_path}/no.pth' not found"
    assert not (tmp_path / 'b').exists()
