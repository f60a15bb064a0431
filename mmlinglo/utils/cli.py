# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What the command lines under ``tools/`` have in common."""

import argparse
import atexit
import errno
import importlib.util
import logging
import os
import os.path as osp
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import mmengine
import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.hooks import LoggerHook
from mmengine.logging import print_log

from mmlinglo.checkpoint import CheckpointError, use_in_mmengine
from mmlinglo.engine import TrainingError, prepare_cpu_distributed
from mmlinglo.hub import find_recipe

from .screen import quiet_screen

# Settings of torch's DataLoader that it refuses without data workers.
WORKER_SETTINGS = ('multiprocessing_context', 'persistent_workers', 'prefetch_factor', 'timeout')
# Pages that describe the layouts of public data sets.
LAYOUTS = {
    'data/coco/': 'configs/coco/README.md',
    'ADEChallengeData2016': 'configs/ade20k/README.md',
    'data/imagenet': 'configs/imagenet/README.md',
}
# What loads the files of a data set, if none of the user's own code does.
DATA_SET_CODE = ('json', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg', 'numpy', 'pycocotools')
FILE_ERRORS = 'EACCES EEXIST EISDIR ENOSPC ENOTDIR EPERM EROFS'.split()
# What mmengine's logging back ends import. pip knows the packages by the same names.
LOG_PACKAGES = dict(
    AimVisBackend='aim',
    ClearMLVisBackend='clearml',
    DVCLiveVisBackend='dvclive',
    MLflowVisBackend='mlflow',
    NeptuneVisBackend='neptune',
    TensorboardVisBackend='tensorboard',
    WandbVisBackend='wandb',
)


class UsageError(Exception):
    """A mistake in the arguments or the config, explained in its message."""


class ConfigError(UsageError):
    """A config whose own code fails; the error in it is the ``__cause__``."""


def run(main: Callable[[], Optional[int]]) -> None:
    """Run a tool with a quiet screen; mistakes of the user end it with one message and exit status 1.

    An error in the code of a config is shown with the lines of that code. Ctrl-C ends it without a
    traceback.

    Args:
        main: The tool. What it returns is the exit status; None and 0 are success.
    """
    # read from sys.argv, because the parser, which shows help and errors itself, runs later
    screen = nullcontext() if '--verbose' in sys.argv else quiet_screen()
    try:
        with screen:
            status = main()
            sys.stdout.flush()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # A process that leaves while another still uses the group may take that one with it.
            torch.distributed.barrier()
            if torch.distributed.get_backend() == 'gloo':
                _leave(status or 0)
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UsageError, CheckpointError, FileNotFoundError) as error:
        if isinstance(error, ConfigError) and error.__cause__ is not None:
            sys.stderr.writelines(_format_own_frames(error.__cause__))
        sys.exit(f'error: {error}')
    except TrainingError as error:
        # A data worker's message has a traceback in front, which ends with the class and the message.
        message = str(error).splitlines()[-1].split(f'{TrainingError.__name__}: ')[-1]
        print_log(message, logger='current', level=logging.ERROR)  # also into the log file
        sys.exit(f'error: {message}')
    except Exception as error:
        explanation = _explain(error)
        if explanation is None:
            raise
        sys.exit(f'error: {explanation}')
    if status:
        sys.exit(status)


def _explain(error: Exception) -> Optional[str]:
    """The message, if files, a `type` that no registry has, or a data set that does not fit caused it."""
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in FILE_ERRORS:
        return f'{error.filename!r}: {error.strerror}'
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals['__name__'] for frame in frames]
    if isinstance(error, KeyError) and modules[-1].startswith('mmengine.registry.'):
        return error.args[0]
    loading = [i for i, frame in enumerate(frames) if frame.f_code.co_name == 'full_init']
    if loading and all(name.split('.')[0] in DATA_SET_CODE for name in modules[loading[0] :]):
        dataset = frames[loading[0]].f_locals['self']
        return (
            f'{dataset.ann_file or dataset.data_prefix!r} cannot be loaded '
            f'({type(error).__name__}: {error})\n'
            'python tools/misc/check_dataset.py CONFIG tells what is wrong with a data set'
        )
    return None


def _format_own_frames(error: BaseException) -> Iterator[str]:
    """Lines of a traceback and of those that it follows from, without the frames of mmengine."""
    earlier = error.__cause__ or error.__context__
    if earlier is not None:
        yield from _format_own_frames(earlier)
    library = osp.dirname(mmengine.__file__)
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith((library, __file__)):
            yield from traceback.format_list([frame])
    yield from traceback.format_exception_only(type(error), error)


def config_parser(description: str) -> argparse.ArgumentParser:
    """Parser with the arguments ``config`` and ``--cfg-options``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, or name of a recipe in configs/')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        type=key_value,
        action=DictAction,
        help='override settings of the config with key=value pairs; write lists as key="[a,b]" or '
        'key=a,b, and nested tuples as key="[(a,b),(c,d)]", quoted and without spaces',
    )
    return parser


def key_value(text: str) -> str:
    """A word of ``--cfg-options``, for argparse."""
    if '=' not in text[1:]:
        raise argparse.ArgumentTypeError(f'must be key=value, without spaces, got {text!r}')
    return text


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``, for :func:`mmlinglo.utils.load_checkpoint_file`."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints in full, which runs any code in them: use it only if you know who '
        'made them; default: read weights, numbers and texts, and refuse the rest',
    )


def runner_parser(description: str) -> argparse.ArgumentParser:
    """Parser with the arguments that ``train.py`` and ``test.py`` share."""
    parser = config_parser(description)
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints; default: work_dirs/ and the config name',
    )
    parser.add_argument(
        '--verbose',
        action='store_true',
        help='show everything on the screen that goes to the log file',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    add_trust_argument(parser)
    return parser


def load_config(path_or_name: str, cfg_options: Optional[dict] = None) -> Config:
    """Read the config of an experiment.

    Args:
        path_or_name: Config file, or name of a recipe of this project, such as
            ``'retinanet_linglo-b0_fpn_1x_coco'``. An existing file wins.
        cfg_options: Settings to override, from ``--cfg-options``.

    Raises:
        UsageError: If there is no such file or recipe, with the names of similar
            recipes; or if it cannot be read or has no model.
    """
    path = _find_config(path_or_name)
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise ConfigError(f'config {path!r}: {type(error).__name__}: {error}') from error
    if cfg_options is not None:
        try:
            cfg.merge_from_dict(cfg_options)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f'--cfg-options do not fit {path!r}: {error}') from error
    missing = [key for key in ('model', 'default_scope') if key not in cfg]
    if missing:
        raise UsageError(
            f'config {path!r} lacks {" and ".join(missing)}: give the config of an experiment, '
            'such as configs/coco/retinanet_linglo-b0_fpn_1x_coco.py'
        )
    return cfg


def _find_config(path_or_name: str) -> str:
    if osp.isfile(path_or_name):
        return path_or_name
    name = Path(path_or_name).stem if path_or_name.endswith('.py') else path_or_name
    try:
        recipe = find_recipe(name)
    except ValueError as error:
        raise UsageError(f'config {path_or_name!r} not found, and {error}') from error
    if name != path_or_name:
        raise UsageError(
            f'config {path_or_name!r} not found. For the recipe of this name give {name!r}'
        )
    return str(recipe)


def checked_device(name: Optional[str]) -> str:
    """Return the device of ``--device``. Without it, return the first accelerator, else the CPU.

    Raises:
        UsageError: If the device cannot be used here.
    """
    name = name or get_device()
    try:
        torch.zeros(1, device=name)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f'--device {name!r} cannot be used here: {reason}') from error
    return name


def load_runner_config(args: argparse.Namespace) -> Config:
    """Read the config for a Runner and prepare this process for ``args.launcher``.

    mmengine then reads all checkpoints safely, unless ``args.trust_checkpoint`` is set.

    Raises:
        UsageError: If the config cannot be used, or the launcher does not work on this machine.
    """
    cfg = load_config(args.config, args.cfg_options)
    use_in_mmengine(args.trust_checkpoint)
    if not args.verbose:
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmlinglo.ProgressHook')]
    _drop_worker_settings(cfg)
    _use_one_log_writer(cfg)
    check_log_backends(cfg)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', Path(cfg.filename).stem)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise UsageError(
            '--launcher pytorch is for processes that torchrun has started: use tools/dist_train.sh '
            'or tools/dist_test.sh'
        )
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UsageError(
            f'{processes} processes on a machine with {torch.cuda.device_count()} GPUs: '
            'start one per GPU'
        )
    if args.launcher != 'none' and not torch.cuda.is_available():
        if args.launcher != 'pytorch':
            raise UsageError(
                f'--launcher {args.launcher} needs GPUs; without any, use tools/dist_train.sh '
                'or tools/dist_test.sh'
            )
        prepare_cpu_distributed(cfg)
    return cfg


def _leave(status: int) -> None:
    """End this process without destroying C++ objects.

    Now and then, one of gloo's threads still runs then, and the process aborts after its work is done
    ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check_data_files(cfg: Config, config: str, *splits: str) -> None:
    """Refuse missing files and folders of data sets before anything is built.

    Args:
        cfg: The config.
        config: Its name for the message.
        splits: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        UsageError: Names the first that is missing, and where its layout is described.
    """
    for split in splits:
        for dataset in leaf_datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}):
            kind = type_name(dataset.get('type', ''))
            if dataset.get('backend_args') or holds_pixels(dataset):
                continue  # not on this disk, or downloaded if need be
            folder = dataset.get('split', '') if kind.startswith('ImageNet') else ''
            prefix = dataset.get('data_prefix') or folder
            prefixes = prefix.values() if isinstance(prefix, dict) else [prefix]
            names = (name for name in (dataset.get('ann_file'), *prefixes) if isinstance(name, str))
            for path in (osp.join(dataset.get('data_root') or '', name) for name in names):
                if path and '://' not in path and not osp.exists(path):
                    pages = (page for part, page in LAYOUTS.items() if part in path)
                    raise UsageError(
                        f'{path!r}, which {split}_dataloader reads, not found\n'
                        f'{next(pages, "docs/custom_dataset.md")} describes the layout, and '
                        f'python tools/misc/check_dataset.py {config} checks the data'
                    )


def leaf_datasets(dataset: dict) -> Iterator[dict]:
    """Settings of the data sets in a wrapper such as RepeatDataset, or of the data set itself."""
    if 'datasets' in dataset:  # ConcatDataset
        for inner in dataset['datasets']:
            yield from leaf_datasets(inner)
    elif isinstance(dataset.get('dataset'), dict):
        yield from leaf_datasets(dataset['dataset'])
    else:
        yield dataset


def holds_pixels(dataset: dict) -> bool:
    """Whether a data set has arrays, which it downloads, and no picture files."""
    kind = type_name(dataset.get('type', ''))
    return 'MNIST' in kind or 'CIFAR' in kind


def type_name(value: Any) -> str:
    """Name of a ``type`` in a config: a class, or a text with or without a scope."""
    return value.split('.')[-1] if isinstance(value, str) else value.__name__


def _drop_worker_settings(cfg: Config) -> None:
    """Remove settings that need data workers from loaders without any, so that ``num_workers=0`` works."""
    for loader in (cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test')):
        if isinstance(loader, dict) and loader.get('num_workers', 0) == 0:
            for key in WORKER_SETTINGS:
                loader.pop(key, None)


def _use_one_log_writer(cfg: Config) -> None:
    """If the config uses mmengine's LoggerHook, let only the main process write log files."""
    hooks = cfg.setdefault('default_hooks', {})
    logger = hooks.setdefault('logger', dict(type='LoggerHook'))
    kinds = ('LoggerHook', 'mmengine.LoggerHook', LoggerHook)
    if logger is not None and logger.get('type') in kinds:
        logger['type'] = 'mmlinglo.MainProcessLoggerHook'


def check_log_backends(cfg: Config) -> None:
    backends = (cfg.get('visualizer') or {}).get('vis_backends') or []
    for backend in backends:
        name = type_name(backend['type'] if isinstance(backend, dict) else backend)
        package = LOG_PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise UsageError(f'{name} needs another package: pip install {package}')
