# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""tools/infer.py: the toolboxes' own predictions, on whatever pictures and videos users have."""

import json
import os
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARCH, import_tool, run_tool
from mmengine.config import Config
from PIL import Image

from mmlinglo.utils.cli import UsageError
from mmlinglo.utils.deploy import build_model
from mmlinglo.utils.inference import (
    InputPipeline,
    Prediction,
    Predictor,
    Sample,
    UnreadableError,
    annotate_pictures,
    annotate_video,
    centre_of_largest_row,
    list_files,
)

QUICKSTART = ROOT / 'configs/quickstart'
CONFIGS = dict(
    detection='retinanet_linglo-b0_fpn_2xb4-3e_shapes.py',
    segmentation='fpn_linglo-b0_2xb4-360_shapes-160x160.py',
    classification='linglo-b0_2xb16-8e_shapes.py',
)
CLASSES = ('disc', 'square', 'triangle', 'star')


def tiny_config(task) -> Config:
    cfg = Config.fromfile(QUICKSTART / CONFIGS[task])
    dims = list(TINY_ARCH['embed_dims'])
    cfg.model.backbone.arch = TINY_ARCH
    if task == 'classification':
        cfg.model.head.in_channels = dims[-1]
    else:
        cfg.model.neck.in_channels = dims[1:] if task == 'detection' else dims
    if task == 'detection':
        cfg.model.test_cfg.score_thr = 0.0  # an untrained model is sure of nothing
        cfg.model.test_cfg.update(nms_pre=50, max_per_img=5)
    return cfg


@pytest.fixture(scope='module', params=CONFIGS)
def experiment(request, tmp_path_factory):
    """Task, config file and checkpoint of a very small model with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = tiny_config(request.param)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    # far from zero, so that the deployed form has something to get wrong
    for parameter in model.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    classes = ('background', *CLASSES) if request.param == 'segmentation' else CLASSES
    meta = dict(classes=classes, palette=[[40 * i, 80, 200 - 40 * i] for i in range(len(classes))])
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), folder / 'model.pth'
    )
    cfg.dump(folder / 'config.py')
    return request.param, folder / 'config.py', folder / 'model.pth'


@pytest.fixture(scope='module')
def predictor(experiment):
    return load_predictor(experiment)


def load_predictor(experiment, **settings) -> Predictor:
    _, config, checkpoint = experiment
    return Predictor(
        Config.fromfile(config), torch.load(checkpoint), str(checkpoint), 'cpu', 0.0, **settings
    )


def load_as_it_is(path) -> Sample:
    """With a pipeline that only loads."""
    dataset = dict(pipeline=[dict(type='LoadImageFromFile')])
    cfg = Config(dict(default_scope='mmpretrain', test_dataloader=dict(dataset=dataset)))
    return InputPipeline(cfg)(path)


def scene(height=60, width=90, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 4)


def write(path, image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def annotate(predictor, folder, out, batch_size=1) -> dict:
    return dict(annotate_pictures(predictor, folder, list_files(folder), out, batch_size))


def results(out) -> dict:
    """All JSON results, by the name of the picture."""
    found = [json.loads(path.read_text()) for path in (out / 'preds').rglob('*.json')]
    return {result['input']: result for result in found}


def predict(predictor, *images) -> list:
    return predictor([predictor.load(image) for image in images])


def run_main(*args) -> None:
    assert import_tool('tools/infer.py').main(['--device', 'cpu', *map(str, args)]) == 0


class BrightnessPredictor:
    """The mean of each picture, in the place of a model; refuses black ones and batches of several sizes."""

    def __init__(self):
        self.batches = []

    def load(self, source):
        image = load_as_it_is(source).image if isinstance(source, Path) else source
        return Sample(image, dict(inputs=torch.zeros(3, *image.shape[:2])))

    def __call__(self, samples):
        self.batches.append(len(samples))
        images = [sample.image for sample in samples]
        assert len({image.shape for image in images}) == 1
        if any(image.max() == 0 for image in images):
            raise RuntimeError('too dark\nto see')
        return [Prediction(dict(mean=float(image.mean())), image) for image in images]


def test_predictions_are_those_of_the_toolbox(experiment, predictor, tmp_path):
    """Against the toolboxes' functions and test pipelines, which read the file themselves."""
    task, config, checkpoint = experiment
    picture = tmp_path / 'in/a.png'
    write(picture, scene())
    assert annotate(predictor, picture.parent, tmp_path / 'out') == {'a.png': None}
    result = results(tmp_path / 'out')['a.png']
    assert (result['height'], result['width']) == (60, 90)

    if task == 'detection':
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(str(config), str(checkpoint), device='cpu')
        expected = inference_detector(model, str(picture)).pred_instances
        assert len(result['scores']) == 5
        assert result['scores'] == pytest.approx(expected.scores.tolist(), abs=1e-6)
        assert np.array(result['bboxes']) == pytest.approx(expected.bboxes.numpy(), abs=1e-3)
        assert result['label_names'] == [CLASSES[label] for label in expected.labels]
    elif task == 'segmentation':
        from mmseg.apis import inference_model, init_model

        model = init_model(str(config), str(checkpoint), device='cpu')
        expected = inference_model(model, str(picture)).pred_sem_seg.data[0].numpy()
        labels = cv2.imread(
            str(tmp_path / 'out/preds' / result['label_image']), cv2.IMREAD_UNCHANGED
        )
        assert labels.dtype == np.uint8
        assert labels.shape == expected.shape
        assert (labels == expected).mean() > 0.999
        names = ('background', *CLASSES)
        for entry in result['classes']:
            assert entry['name'] == names[entry['label']]
            share = (labels == entry['label']).sum() / (60 * 90)
            assert entry['share'] == pytest.approx(share, abs=1e-6)
        assert {entry['label'] for entry in result['classes']} == set(labels.ravel())
    else:
        from mmengine.dataset import Compose, default_collate
        from mmpretrain.apis import get_model

        cfg = Config.fromfile(config)
        data = Compose(cfg.test_dataloader.dataset.pipeline)(dict(img_path=str(picture)))
        expected = get_model(str(config), str(checkpoint)).test_step(default_collate([data]))[0]
        assert result['pred_scores'] == pytest.approx(expected.pred_score.tolist(), abs=1e-6)
        assert result['pred_class'] == CLASSES[expected.pred_label.item()]


def test_drawings_show_the_picture_in_its_colours(experiment, predictor, tmp_path):
    """Blue stays blue where nothing is drawn, or shines through."""
    task, *_ = experiment
    image = np.full((120, 180, 3), (230, 90, 10), np.uint8)
    write(tmp_path / 'in/a.png', image)
    annotate(predictor, tmp_path / 'in', tmp_path / 'out')
    drawing = cv2.imread(str(tmp_path / 'out/vis/a.png')).astype(int)
    assert drawing.shape == image.shape
    assert (drawing != image).any()
    if task == 'segmentation':  # half the picture, half the colour of the class (RGB)
        palette = np.array([[40 * i, 80, 200 - 40 * i] for i in range(5)])[:, ::-1]
        result = results(tmp_path / 'out')['a.png']
        labels = cv2.imread(
            str(tmp_path / 'out/preds' / result['label_image']), cv2.IMREAD_UNCHANGED
        )
        close = abs(drawing - (image // 2 + palette[labels] // 2)).max(axis=-1) <= 2
        assert close.mean() > 0.8  # all but the names
    else:
        assert (drawing == image).all(axis=-1).mean() > 0.2


def test_deployed_form_predicts_the_same(experiment, predictor):
    deployed = load_predictor(experiment, deploy=True)
    parameters = [sum(p.numel() for p in each.model.parameters()) for each in (deployed, predictor)]
    assert parameters[0] < parameters[1]
    images = [scene(seed=1)]
    first, second = (predict(each, *images)[0] for each in (predictor, deployed))
    if first.labels is not None:
        assert (first.labels == second.labels).mean() > 0.999
    else:
        key = 'scores' if 'scores' in first.result else 'pred_scores'
        assert first.result[key] == pytest.approx(second.result[key], abs=1e-5)


def test_batches_change_nothing(predictor, tmp_path):
    """Pictures of several sizes, one by one and three at a time."""
    for i, size in enumerate([(60, 90), (60, 90), (60, 90), (90, 60), (40, 120)]):
        write(tmp_path / f'in/{i}.png', scene(*size, seed=i))
    for batch_size in (1, 3):
        outcome = annotate(predictor, tmp_path / 'in', tmp_path / f'out{batch_size}', batch_size)
        assert set(outcome.values()) == {None}
    one, three = (results(tmp_path / name) for name in ('out1', 'out3'))
    assert one.keys() == three.keys()
    for name, result in one.items():
        if 'classes' in result:
            paths = [tmp_path / out / f'preds/{name}.png' for out in ('out1', 'out3')]
            labels = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths]
            assert (labels[0] == labels[1]).mean() > 0.999
        else:
            key = 'scores' if 'scores' in result else 'pred_scores'
            assert result[key] == pytest.approx(three[name][key], abs=1e-5)


def test_same_stems_keep_their_own_results(tmp_path):
    brightness = {'a.jpg': 10, 'a.png': 60, 'sub/a.jpg': 110, 'sub/deep/a.JPG': 160, 'a.b.tif': 210}
    for name, value in brightness.items():
        write(tmp_path / 'in' / name, np.full((40, 40, 3), value, np.uint8))
    annotate(BrightnessPredictor(), tmp_path / 'in', tmp_path / 'out')
    found = results(tmp_path / 'out')
    assert {name: round(result['mean']) for name, result in found.items()} == brightness
    for name, value in brightness.items():
        assert (tmp_path / f'out/preds/{name}.json').is_file()
        assert cv2.imread(str(tmp_path / 'out/vis' / name)).mean() == pytest.approx(value, abs=2)


def test_failures_do_not_stop_the_rest(tmp_path):
    folder = tmp_path / 'in'
    for name in ('a.png', 'e.png', 'z.png'):
        write(folder / name, scene())
    write(folder / 'dark.png', np.zeros((60, 90, 3), np.uint8))
    whole = cv2.imencode('.jpg', scene())[1].tobytes()
    (folder / 'cut.jpg').write_bytes(whole[: len(whole) * 9 // 10])
    (folder / 'empty.jpg').touch()
    (folder / 'text.jpg').write_text('no picture')
    (folder / 'gone.png').symlink_to('nowhere.png')
    os.mkfifo(folder / 'pipe.png')
    outcome = annotate(BrightnessPredictor(), folder, tmp_path / 'out', batch_size=2)
    done = {name for name, problem in outcome.items() if problem is None}
    assert done == {'a.png', 'e.png', 'z.png'}
    assert outcome['dark.png'] == 'RuntimeError: too dark'
    assert outcome['cut.jpg'].startswith('damaged: image file is truncated')
    assert outcome['text.jpg'].startswith('the loader of the config fails: failed to load image')
    for name in ('empty.jpg', 'gone.png', 'pipe.png'):
        assert outcome[name] == 'the file is missing, empty or not a regular file'
    assert results(tmp_path / 'out').keys() == done
    written = [path for path in (tmp_path / 'out').rglob('*') if path.is_file()]
    assert len(written) == 2 * len(done)


def test_pictures_of_different_sizes_share_no_batch(tmp_path):
    for i, size in enumerate([(40, 40), (40, 40), (40, 50), (40, 40), (40, 40), (40, 40)]):
        write(tmp_path / f'in/{i}.png', scene(*size))
    predictor = BrightnessPredictor()
    annotate(predictor, tmp_path / 'in', tmp_path / 'out', batch_size=2)
    assert predictor.batches == [2, 1, 2, 1]


def test_no_more_than_a_batch_is_read_ahead(tmp_path):
    write(tmp_path / 'in/a.png', scene())
    asked = []

    def names():
        for i in range(50):
            asked.append(i)
            yield 'a.png'

    steps = annotate_pictures(
        BrightnessPredictor(), tmp_path / 'in', names(), tmp_path / 'out', batch_size=4
    )
    for done, _ in enumerate(steps, start=1):
        assert len(asked) <= done + 4


def test_links_are_read_and_never_written_through(tmp_path):
    write(tmp_path / 'outside/a.png', scene())
    before = (tmp_path / 'outside/a.png').read_bytes()
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/link.png').symlink_to('../outside/a.png')
    (tmp_path / 'out/vis').mkdir(parents=True)
    (tmp_path / 'out/vis/link.png').symlink_to('../../outside/a.png')
    assert annotate(BrightnessPredictor(), tmp_path / 'in', tmp_path / 'out') == {'link.png': None}
    assert (tmp_path / 'outside/a.png').read_bytes() == before
    assert [path.name for path in (tmp_path / 'outside').iterdir()] == ['a.png']
    assert not (tmp_path / 'out/vis/link.png').is_symlink()


def test_listing_follows_links_once_and_leaves_out_what_is_hidden(tmp_path):
    for name in ('b.jpg', 'a.txt', 'sub/c.jpg', '.hidden.jpg', '.git/d.jpg', 'out/vis/b.jpg'):
        path = tmp_path / 'in' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere/e.jpg').touch()
    (tmp_path / 'in/linked').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'in/sub/circle').symlink_to(tmp_path / 'in')
    found = list(list_files(tmp_path / 'in', skip=[tmp_path / 'in/out/vis']))
    assert found == ['a.txt', 'b.jpg', 'linked/e.jpg', 'sub/c.jpg']


@pytest.mark.parametrize('kind', ['grey', 'palette', '16-bit', 'RGBA', 'CMYK', 'bilevel', 'EXIF'])
def test_unusual_pictures_are_read_as_colour(kind, tmp_path):
    """Against Pillow's own conversion to RGB."""
    original = Image.fromarray(scene())
    path, expected, tolerance, settings = tmp_path / 'a.png', original, 0, {}
    if kind == 'grey':
        saved = expected = original.convert('L')
    elif kind == 'palette':
        saved = expected = original.convert('P')
    elif kind == '16-bit':
        grey = np.asarray(original.convert('L'))
        saved, expected = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey)
    elif kind == 'RGBA':
        saved = original.copy()
        saved.putalpha(100)
    elif kind == 'CMYK':
        path, tolerance, settings = tmp_path / 'a.jpg', 12, dict(quality=100, subsampling=0)
        saved = original.convert('CMYK')
    elif kind == 'bilevel':
        saved = expected = original.convert('1')
    else:
        path, tolerance, settings = tmp_path / 'a.jpg', 12, dict(quality=100, subsampling=0)
        exif = Image.Exif()
        exif[0x0112] = 6  # taken with the camera turned to the right
        settings['exif'], saved = exif, original
        expected = original.transpose(Image.Transpose.ROTATE_270)
    saved.save(path, **settings)
    image = load_as_it_is(path).image
    expected = np.asarray(expected.convert('RGB')).astype(int)[..., ::-1]
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert abs(image - expected).max() <= tolerance


def test_data_sets_that_hold_the_pixels(tmp_path):
    """CIFAR-10's are RGB, and nothing loads them: the picture is resized as in evaluation."""
    cfg = Config.fromfile(ROOT / 'configs/cifar10/linglo-b0_1xb128-30e_cifar10.py')
    red = np.zeros((40, 40, 3), np.uint8)
    red[..., 2] = 255  # BGR
    write(tmp_path / 'red.png', red)
    for source in (red, tmp_path / 'red.png'):
        sample = InputPipeline(cfg)(source)
        assert sample.shape == (3, 96, 96)
        assert (sample.image == red).all()
        assert sample.data['inputs'].float().mean((1, 2)).tolist() == [255, 0, 0]


def test_names_of_classes_come_from_the_config_if_the_checkpoint_has_none():
    cfg = tiny_config('segmentation')
    weights = dict(state_dict=build_model(cfg).state_dict())
    predictor = Predictor(cfg, weights, 'weights.pth', 'cpu')
    found = predict(predictor, scene())[0].result['classes']
    names = ('background', *CLASSES)
    assert all(entry['name'] == names[entry['label']] for entry in found)
    for loader in (cfg.test_dataloader, cfg.val_dataloader):
        loader.dataset.pop('metainfo')
    with pytest.raises(ValueError, match=r"neither 'weights.pth' nor the config names the classes"):
        Predictor(cfg, weights, 'weights.pth', 'cpu')


def test_place_of_a_class_name_is_mmsegs():
    from mmseg.visualization import SegLocalVisualizer

    visualizer = SegLocalVisualizer()
    rng = np.random.default_rng(0)
    for density in (0.02, 0.3, 1.0):
        mask = (rng.random((37, 53)) < density).astype(np.uint8)
        assert list(centre_of_largest_row(mask)) == list(visualizer._get_center_loc(mask))


def write_video(path, num_frames=7, size=(90, 60), fps=12.5, code='mp4v') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), fps, size)
    assert writer.isOpened()
    for i in range(num_frames):
        writer.write(np.full((size[1], size[0], 3), (200, 40, 20 * i), np.uint8))
    writer.release()


def test_video(experiment, predictor, tmp_path):
    task, *_ = experiment
    video = tmp_path / 'in/clip.mp4'
    write_video(video)
    steps = annotate_video(
        predictor, mmcv.VideoReader(str(video)), video.name, tmp_path / 'out', batch_size=3
    )
    assert list(steps) == list(range(7))
    lines = (tmp_path / 'out/preds/clip.mp4.jsonl').read_text().splitlines()
    frames = [json.loads(line) for line in lines]
    assert [frame['frame'] for frame in frames] == list(range(7))
    assert [frame['time'] for frame in frames] == pytest.approx([i / 12.5 for i in range(7)])
    written = mmcv.VideoReader(str(tmp_path / 'out/vis/clip.mp4'))
    assert (written.frame_cnt, written.resolution, written.fps) == (7, (90, 60), 12.5)

    third = mmcv.VideoReader(str(video))[3]
    expected = predict(predictor, third)[0]
    assert abs(written[3].astype(int) - expected.drawing).mean() < 12  # lossy
    if task == 'segmentation':
        assert frames[3]['label_image'] == 'clip.mp4/000003.png'
        labels = cv2.imread(str(tmp_path / 'out/preds/clip.mp4/000003.png'), cv2.IMREAD_UNCHANGED)
        assert (labels == expected.labels).mean() > 0.999
    else:
        key = 'scores' if task == 'detection' else 'pred_scores'
        assert frames[3][key] == pytest.approx(expected.result[key], abs=1e-5)


def test_videos_of_the_same_stem_and_of_odd_size(tmp_path):
    for name, code, size in (('a.mp4', 'mp4v', (90, 60)), ('a.avi', 'MJPG', (92, 64))):
        video = tmp_path / 'in' / name
        write_video(video, size=size, code=code)
        list(
            annotate_video(
                BrightnessPredictor(), mmcv.VideoReader(str(video)), name, tmp_path / 'out'
            )
        )
    sizes = {
        path.name: mmcv.VideoReader(str(path)).resolution
        for path in (tmp_path / 'out/vis').iterdir()
    }
    assert sizes == {'a.mp4': (90, 60), 'a.avi.mp4': (92, 64)}
    assert len(list((tmp_path / 'out/preds').iterdir())) == 2

    odd = [np.full((61, 91, 3), 100, np.uint8)] * 3

    class OddReader:
        fps, frame_cnt = float('nan'), 0

        def __iter__(self):
            return iter(odd)

    list(annotate_video(BrightnessPredictor(), OddReader(), 'odd.mp4', tmp_path / 'odd'))
    written = mmcv.VideoReader(str(tmp_path / 'odd/vis/odd.mp4'))
    assert (written.frame_cnt, written.resolution, written.fps) == (3, (90, 60), 30)


def test_a_video_that_is_cut_off(tmp_path):
    whole = tmp_path / 'whole.avi'
    write_video(whole, num_frames=60, code='MJPG')
    content = whole.read_bytes()
    cut = tmp_path / 'cut.avi'
    cut.write_bytes(content[: len(content) // 2])
    steps = annotate_video(
        BrightnessPredictor(), mmcv.VideoReader(str(cut)), cut.name, tmp_path / 'out'
    )
    done = []
    with pytest.raises(UnreadableError, match='of 60 frames could be read'):
        done.extend(steps)
    lines = (tmp_path / 'out/preds/cut.avi.jsonl').read_text().splitlines()
    assert 0 < len(lines) < 60
    assert mmcv.VideoReader(str(tmp_path / 'out/vis/cut.avi.mp4')).frame_cnt == len(lines)


def test_a_video_that_fails_leaves_nothing(tmp_path):
    write_video(tmp_path / 'a.mp4')
    reader = mmcv.VideoReader(str(tmp_path / 'a.mp4'))

    class FailingPredictor(BrightnessPredictor):
        def __call__(self, samples):
            if len(self.batches) == 3:
                raise RuntimeError('broken')
            return super().__call__(samples)

    with pytest.raises(RuntimeError, match='broken'):
        list(annotate_video(FailingPredictor(), reader, 'a.mp4', tmp_path / 'out'))
    assert not [path for path in (tmp_path / 'out').rglob('*') if path.is_file()]


def test_mistakes_in_the_arguments(experiment, tmp_path):
    task, *model = experiment
    if task != 'classification':
        pytest.skip('the same for all tasks')
    picture = tmp_path / 'in/a.png'
    write(picture, scene())
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad.mp4').touch()
    (tmp_path / 'text.mp4').write_text('no video')
    out = tmp_path / 'out'
    resnet = ROOT / 'configs/cifar10/resnet18_1xb128-30e_cifar10.py'
    for args, message in (
        ([*model, tmp_path / 'no.jpg'], r"input '.*no\.jpg' not found"),
        ([*model, tmp_path / 'empty'], r"no pictures \(\.bmp, .*\) in '.*empty'"),
        ([*model, tmp_path / 'bad.mp4'], r"video '.*bad\.mp4': no video that OpenCV can read"),
        ([*model, tmp_path / 'text.mp4'], r"video '.*text\.mp4': no video that OpenCV can read"),
        ([*model, picture, '--batch-size', '0'], '--batch-size must be at least 1, got 0'),
        ([*model, picture, '--cfg-options', 'default_scope=mmpose'], "got 'mmpose'"),
        ([*model, picture, '--cfg-options', 'test_dataloader=None'], 'has no test_dataloader'),
        ([model[0], 'no.pth', picture], r"checkpoint 'no\.pth' not found"),
        ([resnet, model[1], picture, '--deploy'], 'no part that can be re-parameterised'),
    ):
        with pytest.raises((UsageError, FileNotFoundError), match=message):
            run_main(*args, '--out-dir', out)
    assert not out.exists()

    for source, target in (
        (picture.parent, picture.parent),
        (out / 'vis/b.png', out),
        (out / 'preds', out),
        (out / 'vis/deep', out),
    ):
        if not source.exists():
            write(source if source.suffix else source / 'b.png', scene())
        with pytest.raises(
            UsageError, match=r'is --out-dir .* itself, or lies in .* where results go'
        ):
            run_main(*model, source, '--out-dir', target)
    (tmp_path / 'file').touch()
    with pytest.raises(UsageError, match='file'):
        run_main(*model, picture, '--out-dir', tmp_path / 'file')


def test_unusable_device(tmp_path):
    write(tmp_path / 'a.png', scene())
    config = QUICKSTART / CONFIGS['classification']
    for name in ('cuda:99', 'gpu'):
        args = [config, 'no.pth', tmp_path / 'a.png', '--device', name]
        with pytest.raises(UsageError, match=f"--device '{name}' cannot be used here"):
            run_main(*args)


@pytest.mark.slow
def test_command_line(experiment, tmp_path):
    """A folder within which the results go, with a damaged file; then again, with the same results."""
    _, *model = experiment
    folder = tmp_path / 'pictures'
    for name in ('a.jpg', 'a.png', 'sub/a.jpg'):
        write(folder / name, scene())
    (folder / 'notes.txt').write_text('no picture')
    (folder / 'sub/bad.jpg').touch()
    out = folder / 'results'
    args = ['tools/infer.py', *model, folder, '--out-dir', out, '--device', 'cpu', '--deploy']
    for _ in range(2):
        result = run_tool(*args, check=False)
        assert result.returncode == 1
        assert f'{model[1]}: loaded, predicting on cpu' in result.stderr
        assert f'{folder}/sub/bad.jpg: skipped: the file is missing, empty or' in result.stderr
        assert result.stderr.splitlines()[-1] == ('error: 1 of 4 pictures skipped, see above')
        assert f'3 pictures in {out}/vis' in result.stdout
        assert '1 files of other kinds passed over' in result.stdout
        assert results(out).keys() == {'a.jpg', 'a.png', 'sub/a.jpg'}

    write_video(tmp_path / 'clip.mp4', num_frames=3)
    run_tool('tools/infer.py', *model, tmp_path / 'clip.mp4', '--out-dir', tmp_path / 'out')
    assert len((tmp_path / 'out/preds/clip.mp4.jsonl').read_text().splitlines()) == 3
