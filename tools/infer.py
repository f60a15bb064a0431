# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Run a classifier, detector or segmentor on a picture or a folder of pictures.

The toolboxes' own inferencers do the work. OUT_DIR gets the pictures with boxes, masks or labels in `vis/` and the
predictions in `preds/`: JSON for detectors and classifiers, label images for segmentors.
"""

import argparse
import tempfile
from pathlib import Path
from typing import List, Optional

import mmengine
import torch

from mmlinglo.utils import load_checkpoint_file, load_model_weights
from mmlinglo.utils.cli import UsageError, config_parser, load_config, run
from mmlinglo.utils.deploy import build_model, switch_to_deploy

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


def parse_args() -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('inputs', help='a picture or a folder of pictures')
    parser.add_argument('--out-dir', default='outputs', help='folder for the results')
    parser.add_argument('--device', help='such as cpu or cuda:0; default: the first GPU, else cpu')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score of drawn boxes')
    parser.add_argument(
        '--deploy', action='store_true', help='re-parameterise the model before running it'
    )
    return parser.parse_args()


def find_pictures(inputs: str) -> List[str]:
    path = Path(inputs)
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UsageError(f'input {inputs!r} not found')
    pictures = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not pictures:
        raise UsageError(f'no pictures ({", ".join(SUFFIXES)}) in {inputs!r}')
    return pictures


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    pictures = find_pictures(args.inputs)
    checkpoint = load_checkpoint_file(args.checkpoint)
    model = build_model(cfg).eval()
    load_model_weights(model, checkpoint, args.checkpoint)
    if args.deploy:
        switch_to_deploy(model)
        cfg.model.backbone.deploy = True

    # The inferencers take files: these are known to be safe and to fit each other.
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / 'weights.pth')
        meta = {'dataset_meta': checkpoint.get('meta', {}).get('dataset_meta', {})}
        torch.save(dict(meta=meta, state_dict=model.state_dict()), weights)
        config = str(Path(folder) / 'config.py')
        cfg.dump(config)
        infer = {'mmpretrain': classify, 'mmdet': detect, 'mmseg': segment}[cfg.default_scope]
        infer(config, weights, pictures, args)
    print(f'{len(pictures)} pictures in {Path(args.out_dir) / "vis"}')


def detect(config: str, weights: str, pictures: List[str], args: argparse.Namespace) -> None:
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(config, weights, device=args.device)
    inferencer(pictures, out_dir=args.out_dir, pred_score_thr=args.score_thr, no_save_pred=False)


def segment(config: str, weights: str, pictures: List[str], args: argparse.Namespace) -> None:
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(config, weights, device=args.device)
    inferencer(pictures, out_dir=args.out_dir, img_out_dir='vis', pred_out_dir='preds')


def classify(config: str, weights: str, pictures: List[str], args: argparse.Namespace) -> None:
    from mmpretrain.apis import ImageClassificationInferencer

    out = Path(args.out_dir)
    (out / 'vis').mkdir(parents=True, exist_ok=True)
    inferencer = ImageClassificationInferencer(
        config, weights, device=args.device or default_device()
    )
    results = inferencer(pictures, show_dir=str(out / 'vis'))
    for picture, result in zip(pictures, results):
        result['pred_scores'] = result['pred_scores'].tolist()
        mmengine.dump(result, out / 'preds' / f'{Path(picture).stem}.json')


def default_device() -> Optional[str]:
    return 'cuda:0' if torch.cuda.is_available() else 'cpu'


if __name__ == '__main__':
    run(main)
