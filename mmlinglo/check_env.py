# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Report what mmlinglo can use in this environment, and how to repair what is wrong.

    python -m mmlinglo.check_env

Ends with status 1 if something is wrong. Nothing that may be missing or broken is imported before it
is examined. A missing toolbox is not a fault, since each serves one task.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

PIP, UNINSTALL = 'python -m pip install', 'python -m pip uninstall -y'
DISTRIBUTIONS = {  # by import name: the fork's and OpenMMLab's
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}
TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmpretrain': 'classification'}
IMPORTS = (  # what has to work, in the order in which a fault in one breaks the next
    *('numpy', 'cv2', 'torch', 'torchvision.ops', 'mmengine.runner', 'mmcv.transforms', 'mmcv.ops'),
    *('mmpretrain.apis', 'mmdet.apis', 'mmseg.apis', 'mmlinglo.models'),
)
Problem = Tuple[str, str]  # what is wrong, and the command that repairs it


@dataclass
class Environment:
    """What was found.

    Attributes:
        versions: Of the installed distributions.
        errors: By module, or 'MODULE on DEVICE': first line of what importing or using it raised.
        operators: Where mmcv's operators come from and on which devices they work.
        details: What mmengine collects: GPUs, compilers, versions.
    """

    versions: Dict[str, str] = field(default_factory=dict)
    errors: Dict[str, str] = field(default_factory=dict)
    operators: str = 'none'
    details: Dict[str, Any] = field(default_factory=dict)

    def installed(self, name: str) -> List[str]:
        """Distributions that provide an import name."""
        return [d for d in DISTRIBUTIONS.get(name, (name,)) if d in self.versions]

    @property
    def is_original(self) -> bool:
        """Whether OpenMMLab's own releases are installed rather than the forks."""
        forks = [name for name in self.versions if name.startswith('onedl-')]
        return 'mmengine' in self.versions and not forks

    def tested(self, name: str) -> str:
        """What to tell pip for the tested version of what provides an import name."""
        distribution = DISTRIBUTIONS.get(name, (name, name))[self.is_original]
        return distribution + read_requirements(self.is_original).get(distribution, '')


def read_requirements(original: bool) -> Dict[str, str]:
    """Tested versions of one of the stacks, such as ``{'torch': '==2.11.0', 'numpy': '<2'}``.

    They come from ``requirements/`` in a checkout, and from the package's extras elsewhere.
    """
    files = ['mminstall_openmmlab'] if original else ['torch', 'mminstall', 'det', 'cls', 'seg']
    folder = Path(__file__).resolve().parents[1] / 'requirements'
    if folder.is_dir():
        lines = [line for f in files for line in (folder / f'{f}.txt').read_text().splitlines()]
    else:
        extras = ('"openmmlab"',) if original else ('"torch"', '"seg"')  # seg needs all toolboxes
        lines = [s for s in importlib.metadata.requires('mmlinglo') or [] if s.endswith(extras)]
    found = (re.match(r'([\w-]+)([=<][^;\s]+)', line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def collect() -> Environment:
    """Examine this environment; takes about as long as importing all toolboxes."""
    env = Environment()
    for distribution in importlib.metadata.distributions():
        env.versions.setdefault(distribution.metadata['Name'].lower(), distribution.version)
    for name in IMPORTS:
        _record(env, name, importlib.import_module, name)
    if 'torch' not in env.errors:
        _try_operators(env)
    tools = 'mmengine.utils.dl_utils'
    _record(env, tools, lambda: env.details.update(importlib.import_module(tools).collect_env()))
    return env


def _try_operators(env: Environment) -> None:
    import torch

    devices = ['cpu']
    if shutil.which('nvidia-smi') or torch.cuda.is_available():
        _record(env, 'torch on cuda', lambda: torch.ones(2, device='cuda').sum().item())
        devices += [] if 'torch on cuda' in env.errors else ['cuda']
    for module in ('torchvision.ops', 'mmcv.ops'):
        for device in [] if module in env.errors else devices:
            _record(env, f'{module} on {device}', _try_nms, module, device)
    if 'mmcv.ops' not in env.errors:
        from mmlinglo import mmcv_ops

        ext = mmcv_ops.find_ext()
        env.operators = 'compiled' if mmcv_ops.is_compiled(ext) else 'stand-in by torchvision'
        if ext is None:
            env.operators += ', only where mmlinglo is imported before mmcv.ops'
        works = [device for device in devices if f'mmcv.ops on {device}' not in env.errors]
        env.operators += f'; work on: {", ".join(works) or "no device"}'


def _try_nms(module: str, device: str) -> None:
    """Run NMS on three boxes, of which the second overlaps the first by 81 of 119."""
    import torch

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    kept = importlib.import_module(module).nms(boxes, scores, 0.5)
    indices = (kept[1] if module == 'mmcv.ops' else kept).tolist()
    if indices != [0, 2]:
        raise ValueError(f'NMS keeps the boxes {indices} instead of [0, 2]')


def _record(env: Environment, name: str, action: Callable, *args: str) -> None:
    """Note the first line of what ``action`` raises; drop what it prints."""
    silence, ignored = io.StringIO(), warnings.catch_warnings()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence), ignored:
        warnings.simplefilter('ignore')
        try:
            action(*args)
        except Exception as error:
            lines = str(error).strip().splitlines() or ['']
            env.errors[name] = f'{type(error).__name__}: {lines[0]}'[:300]


def find_problems(env: Environment) -> List[Problem]:
    """Everything that is wrong, causes before what they break."""
    problems = [*_find_in_torch(env), *_find_in_packages(env)]
    operators = _first_error(env, 'mmcv.ops', 'mmcv.ops on cpu', 'mmcv.ops on cuda')
    if operators and 'mmcv.transforms' not in env.errors and not problems:
        from mmlinglo import mmcv_ops

        what = "mmcv's operators were compiled for another torch or without CUDA"
        problems = [(f'{what} ({operators})', mmcv_ops.compile_command())]
    return problems or [*_find_in_imports(env)]


def _first_error(env: Environment, *keys: str) -> str:
    return next((f'{key}: {env.errors[key]}' for key in keys if key in env.errors), '')


def _find_in_torch(env: Environment) -> Iterator[Problem]:
    tested = f'{PIP} {env.tested("torch")} {env.tested("torchvision")}'
    installed = env.versions.get('torch', '0').partition('+')[0]
    major, minor, patch = (*_numbers(installed), 0, 0)[:3]
    pair = f'{PIP} --force-reinstall torch=={installed} torchvision==0.{minor + 15}.{patch}'
    keys = ('torch', 'torchvision.ops', 'torchvision.ops on cpu', 'torchvision.ops on cuda')
    broken, on_gpu = _first_error(env, *keys), _first_error(env, 'torch on cuda')
    if (major, minor) < (2, 5):
        fault = f'{installed} is older than 2.5' if major else 'is not installed'
        yield f'torch {fault}', tested
    elif broken:
        yield f'torch {installed} and torchvision do not work ({broken})', pair
    elif on_gpu:
        what = f'torch {env.versions["torch"]} cannot use the GPU ({on_gpu})'
        yield what, f'nvidia-smi    # its driver must know the CUDA version of torch; or: {pair}'


def _find_in_packages(env: Environment) -> Iterator[Problem]:
    found = {name: env.installed(name) for name in DISTRIBUTIONS}
    for name, installed in found.items():
        if len(installed) > 1:
            what = f'{" and ".join(installed)} are both installed and overwrite each other'
            yield what, f'{UNINSTALL} {" ".join(installed)} && {PIP} {env.tested(name)}'
            return
        if name not in TASKS and not installed:
            yield f'{name} is not installed', f'{PIP} {env.tested(name)}'
    others = {name: d[0] for name, d in found.items() if d and not d[0].startswith('onedl-')}
    if others and not env.is_original:
        what = f'{", ".join(others.values())} of OpenMMLab beside forks (onedl-*): use one stack'
        again = ' '.join(map(env.tested, others))
        yield what, f'{UNINSTALL} {" ".join(others.values())} && {PIP} {again}'
    pins = read_requirements(True).items() if env.is_original else ()
    new = {name: pin for name, pin in pins if _is_newer(env.versions.get(name, ''), pin)}
    if new:  # nobody adapts them to later versions of what they use
        what = ', '.join(f'{name} {env.versions[name]}' for name in new)
        pinned = ' '.join(f"'{name}{pin}'" for name, pin in new.items())
        yield f"OpenMMLab's releases were made for older versions than {what}", f'{PIP} {pinned}'


def _find_in_imports(env: Environment) -> Iterator[Problem]:
    seen = set()
    for module, error in env.errors.items():
        name = module.partition('.')[0]
        if module not in IMPORTS or error in seen or (name in TASKS and not env.installed(name)):
            continue
        seen.add(error)
        again = f'{PIP} --force-reinstall --no-deps {" ".join(env.installed(name)) or name}'
        if name == 'cv2':  # opencv-python needs libGL, which a server may lack
            again = f'{UNINSTALL} opencv-python && {again[: -len(name)]}opencv-python-headless'
        elif name == 'mmlinglo':
            again = 'python -c "import mmlinglo.models"    # shows where it fails'
        yield f'{module} cannot be imported: {error}', again


def _is_newer(version: str, pin: str) -> bool:
    limit = _numbers(pin)
    return _numbers(version) >= limit if pin.startswith('<') else _numbers(version) > limit


def _numbers(version: str) -> Tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', version.partition('+')[0])))


def report(env: Environment, problems: List[Problem]) -> str:
    """What is printed: a line for each part, then the problems with the commands."""
    lines = {'stack': 'original OpenMMLab' if env.is_original else 'maintained forks (onedl-*)'}
    for name in ('torch', 'torchvision', 'numpy', *DISTRIBUTIONS, 'mmlinglo'):
        lines[name] = ', '.join(f'{d} {env.versions[d]}' for d in env.installed(name))
        if not lines[name]:
            lines[name] = 'not installed' + f' (needed for {TASKS.get(name)})' * (name in TASKS)
    lines['mmlinglo'] += f', in {Path(__file__).parent}'
    lines['mmcv operators'] = env.operators
    shown = ('Python', 'GPU', 'CUDA', 'NVCC', 'GCC', 'OpenCV')
    lines.update({name: str(v) for name, v in env.details.items() if name.startswith(shown)})
    text = [f'{name:16}{value}' for name, value in lines.items()]
    found = f'{len(problems)} problem(s), to be solved in this order:'
    text += ['', found if problems else 'No problem found.']
    for number, (what, command) in enumerate(problems, 1):
        text += [f'{number}. {what}', f'   run: {command}']
    return '\n'.join(text)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    env = collect()
    problems = find_problems(env)
    print(report(env, problems))  # noqa: T201
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
