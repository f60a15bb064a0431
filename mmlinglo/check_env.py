# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What of this environment mmlinglo can use, and the line to run for whatever is wrong.

    python -m mmlinglo.check_env

Ends with status 1 if something is wrong. Nothing that may be missing or broken is imported before it
is examined. A toolbox that is not installed is no fault: each serves one task.
"""

import contextlib
import importlib
import importlib.metadata
import io
import platform
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

PIP = 'python -m pip'
FORKS = dict(  # the default stack; keys are the names in imports
    torch='torch==2.11.0',
    mmengine='onedl-mmengine==0.10.12',
    mmcv='onedl-mmcv==2.3.6',
    mmdet='onedl-mmdetection==3.5.1',
    mmseg='onedl-mmsegmentation==1.4.2',
    mmpretrain='onedl-mmpretrain==1.3.6',
)
ORIGINALS = dict(
    torch='torch==2.5.1',
    mmengine='mmengine==0.10.7',
    mmcv='mmcv==2.1.0',
    mmdet='mmdet==3.3.0',
    mmseg='mmsegmentation==1.2.2',
    mmpretrain='mmpretrain==1.2.0',
)
OTHER_MMCV = ('mmcv-lite', 'mmcv-full')  # the same import name
OTHERS = ('torchvision', 'numpy', 'timm', 'setuptools', 'mmlinglo')
TOOLBOXES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
TASKS = dict(mmdet='detection', mmseg='segmentation', mmpretrain='classification')
IMPORTS = {  # what has to work; in the order in which a fault in one breaks the next
    'numpy': 'numpy',
    'cv2': 'cv2',
    'torch': 'torch',
    'torchvision': 'torchvision.ops',
    'mmengine': 'mmengine.runner',
    'mmcv': 'mmcv.transforms',
    'mmcv operators': 'mmcv.ops',
    'mmpretrain': 'mmpretrain.apis',
    'mmdet': 'mmdet.apis',
    'mmseg': 'mmseg.apis',
    'timm': 'timm',
    'mmlinglo': 'mmlinglo.models',
}


@dataclass
class Environment:
    """What was found.

    Attributes:
        python: Version.
        versions: Installed distributions of interest, by their names in the registry.
        wanted_torch: Version that torchvision was built for, None if unknown.
        errors: First line of what importing each of :data:`IMPORTS` raised.
        operators: What mmcv's and torchvision's NMS gave on each device: '' if correct.
        cuda: CUDA version of torch, None for a build without.
        gpus: Name and architecture ('sm_90') of each GPU that torch can use.
        architectures: Architectures that torch was built for.
        driver: Whether there is an NVIDIA driver.
        gpu_error: Why torch cannot use a GPU in spite of the driver.
        details: Further lines of the report.
    """

    python: str = ''
    versions: Dict[str, str] = field(default_factory=dict)
    wanted_torch: Optional[str] = None
    errors: Dict[str, str] = field(default_factory=dict)
    operators: Dict[Tuple[str, str], str] = field(default_factory=dict)
    cuda: Optional[str] = None
    gpus: List[Tuple[str, str]] = field(default_factory=list)
    architectures: List[str] = field(default_factory=list)
    driver: bool = False
    gpu_error: str = ''
    details: Dict[str, str] = field(default_factory=dict)

    @property
    def original(self) -> bool:
        """Whether the original OpenMMLab releases are installed rather than the forks."""
        return _name(ORIGINALS['mmengine']) in self.versions and not any(
            _name(FORKS[name]) in self.versions for name in TOOLBOXES
        )

    @property
    def stack(self) -> Dict[str, str]:
        """Requirements of the stack that is installed, of the forks if none is."""
        return ORIGINALS if self.original else FORKS

    def version(self, name: str) -> Tuple[int, ...]:
        """Leading numbers of a distribution's version; () if it is not installed."""
        found = re.match(r'\d+(\.\d+)*', self.versions.get(name, ''))
        return tuple(map(int, found[0].split('.'))) if found else ()

    def distributions(self, name: str) -> List[str]:
        """Installed distributions that provide the import name of a toolbox."""
        others = OTHER_MMCV if name == 'mmcv' else ()
        names = (_name(FORKS[name]), _name(ORIGINALS[name]), *others)
        return [name for name in names if name in self.versions]


@dataclass(frozen=True)
class Problem:
    """Something wrong, and the command that repairs it."""

    what: str
    run: str


def collect() -> Environment:
    """Examine this environment; takes about as long as importing all toolboxes."""
    env = Environment(python=platform.python_version())
    names = [_name(requirement) for stack in (FORKS, ORIGINALS) for requirement in stack.values()]
    for name in (*names, *OTHER_MMCV, *OTHERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            env.versions[name] = importlib.metadata.version(name)
    if 'torchvision' in env.versions:
        requires = ' '.join(importlib.metadata.requires('torchvision') or [])
        wanted = re.search(r'\btorch ?\(?==([\d.]+)', requires)
        env.wanted_torch = wanted[1] if wanted else None
    for name, module in IMPORTS.items():
        error = _error_of(lambda module=module: importlib.import_module(module))
        if error:
            env.errors[name] = error
    env.driver = shutil.which('nvidia-smi') is not None or Path('/dev/nvidia0').exists()
    if 'torch' not in env.errors:
        _examine_torch(env)
    if 'mmengine' not in env.errors:
        _collect_compilers(env)
    return env


def _examine_torch(env: Environment) -> None:
    import torch

    env.cuda = torch.version.cuda
    devices = ['cpu']
    if torch.cuda.is_available():
        env.architectures = torch.cuda.get_arch_list()
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            env.gpus.append((torch.cuda.get_device_name(index), f'sm_{major}{minor}'))
        devices.append('cuda')
    elif env.driver and env.cuda is not None:
        env.gpu_error = _error_of(torch.cuda.init)
    for device in devices:
        for package, name in (('mmcv', 'mmcv operators'), ('torchvision', 'torchvision')):
            if name not in env.errors:
                env.operators[package, device] = _error_of(
                    lambda package=package, device=device: _try_nms(package, device)
                )


def _try_nms(package: str, device: str) -> None:
    """Run NMS on three boxes, of which the second overlaps the first by 81 of 119.

    Raises:
        ValueError: If the result is wrong. What fails inside is passed on.
    """
    import torch

    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]], dtype=torch.float32)
    boxes, scores = boxes.to(device), torch.tensor([0.9, 0.8, 0.7]).to(device)
    kept = importlib.import_module(f'{package}.ops').nms(boxes, scores, 0.5)
    indices = (kept[1] if package == 'mmcv' else kept).tolist()
    if indices != [0, 2]:
        raise ValueError(f'NMS keeps the boxes {indices} instead of [0, 2]')


def _collect_compilers(env: Environment) -> None:
    found: dict = {}

    def collect() -> None:
        found.update(importlib.import_module('mmengine.utils.dl_utils').collect_env())

    _error_of(collect)
    for name in ('GCC', 'NVCC', 'OpenCV'):
        if name in found:
            env.details[name] = str(found[name])


def _error_of(action: Callable[[], object]) -> str:
    """First line of the exception that ``action`` raises, '' if none; what it prints is dropped."""
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                action()
            except Exception as error:
                lines = str(error).strip().splitlines() or ['']
                return f'{type(error).__name__}: {lines[0]}'[:300]
    return ''


def find_problems(env: Environment) -> List[Problem]:
    """Everything that is wrong, causes before what they break."""
    problems = [
        *_problems_of_python_and_torch(env),
        *_problems_of_gpus(env),
        *_problems_of_packages(env),
        *_problems_of_operators(env),
    ]
    if not problems:  # else failing imports are most likely their consequences
        causes = {
            error: name for name, error in reversed(env.errors.items()) if _is_needed(env, name)
        }
        for error, name in reversed(causes.items()):
            what = f'{IMPORTS[name]} cannot be imported: {error}'
            problems.append(Problem(what, _again(env, name)))
    return problems


def _problems_of_python_and_torch(env: Environment) -> List[Problem]:
    problems = []
    torch, torchvision = env.version('torch'), env.version('torchvision')
    default = env.stack['torch'].partition('==')[2]
    both = f'{PIP} install torch=={default} torchvision=={_torchvision_for(default)}'
    if not torch:
        return [Problem('torch is not installed', both)]
    if torch < (2, 1):
        problems.append(Problem(f'torch {env.versions["torch"]} is older than 2.1', both))
    installed = _plain(env.versions['torch'])
    if 'torch' in env.errors:
        run = f'{PIP} install --force-reinstall torch=={installed}'
        problems.append(Problem(f'torch cannot be imported: {env.errors["torch"]}', run))
    pair = f'torchvision=={_torchvision_for(installed)}'
    if not torchvision:
        what = 'torchvision is not installed: mmpretrain and mmdet need it'
        problems.append(Problem(what, f'{PIP} install --no-deps {pair}'))
    elif env.wanted_torch not in (None, installed):
        what = (
            f'torchvision {env.versions["torchvision"]} was built for torch {env.wanted_torch}, '
            f'not {env.versions["torch"]}'
        )
        problems.append(Problem(what, f'{PIP} install --no-deps {pair}'))
    elif _failed(env, 'torchvision', 'torchvision'):
        what = (
            "torchvision's operators do not work: torch and torchvision are builds for different "
            f'devices ({_failed(env, "torchvision", "torchvision")})'
        )
        run = f'{PIP} install --force-reinstall torch=={installed} {pair}'
        problems.append(Problem(what, run))
    return problems


def _problems_of_gpus(env: Environment) -> List[Problem]:
    problems = []
    if env.driver and not env.gpus and 'torch' in env.versions and 'torch' not in env.errors:
        if env.cuda is None:
            what = 'there is an NVIDIA driver, but this torch was built without CUDA'
            installed = _plain(env.versions['torch'])
            pair = f'torch=={installed} torchvision=={_torchvision_for(installed)}'
            # PyPI's builds for Linux have CUDA.
            run = f'{PIP} install --force-reinstall --index-url https://pypi.org/simple {pair}'
        else:
            what = f'torch (CUDA {env.cuda}) cannot use the GPU: {env.gpu_error or "none visible"}'
            run = 'nvidia-smi    # the driver\'s "CUDA Version" must not be below that of torch'
        problems.append(Problem(what, run))
    for name, architecture in dict.fromkeys(env.gpus):
        if not any(_serves(built, architecture) for built in env.architectures):
            what = (
                f'this torch has no code for {name} ({architecture}), only for '
                f'{" ".join(env.architectures)}'
            )
            run = f'{PIP} install --upgrade torch torchvision    # then compile mmcv anew'
            problems.append(Problem(what, run))
    return problems


def _problems_of_packages(env: Environment) -> List[Problem]:
    problems = []
    for name in TOOLBOXES:
        installed = env.distributions(name)
        if len(installed) > 1:
            what = f'{" and ".join(installed)} are both installed and overwrite each other'
            run = f'{PIP} uninstall -y {" ".join(installed)} && {_install(env, name)}'
            problems.append(Problem(what, run))
        elif name in ('mmengine', 'mmcv') and not installed and name in env.errors:
            problems.append(Problem(f'{name} is not installed', _install(env, name)))
    forks = [_name(FORKS[name]) for name in TOOLBOXES if _name(FORKS[name]) in env.versions]
    originals = [d for name in TOOLBOXES for d in env.distributions(name) if d not in forks]
    if forks and originals and not problems:
        missing = [name for name in TOOLBOXES if set(env.distributions(name)) & set(originals)]
        what = f'{", ".join(originals)} of OpenMMLab beside {", ".join(forks)}: take one stack'
        installs = ' && '.join(_install(env, name) for name in missing)
        problems.append(Problem(what, f'{PIP} uninstall -y {" ".join(originals)} && {installs}'))
    if not env.original:
        return problems
    if env.version('numpy') >= (2,):
        what = f'numpy {env.versions["numpy"]} with packages that were compiled for numpy 1'
        problems.append(Problem(what, f"{PIP} install 'numpy<2' 'opencv-python<4.12'"))
    if env.version('mmcv') >= (2, 2) and {'mmdet', 'mmsegmentation'} & set(env.versions):
        what = f'the original mmdet and mmseg refuse mmcv {env.versions["mmcv"]}: below 2.2 only'
        problems.append(Problem(what, _install(env, 'mmcv')))
    if env.version('setuptools') >= (80,) and any(
        'pkg_resources' in e for e in env.errors.values()
    ):
        what = f'setuptools {env.versions["setuptools"]} has no pkg_resources any more'
        problems.append(Problem(what, f"{PIP} install 'setuptools<80'"))
    if env.version('torch') >= (2, 6) and env.version('mmengine') <= (0, 10, 7):
        what = (
            f'with torch {env.versions["torch"]}, mmengine {env.versions["mmengine"]} cannot resume '
            'a training'
        )
        run = f'{PIP} install torch==2.5.1 torchvision==0.20.1 && {_install(env, "mmcv")}'
        problems.append(Problem(what, run))
    return problems


def _problems_of_operators(env: Environment) -> List[Problem]:
    if 'torch' in env.errors or 'mmcv' in env.errors or len(env.distributions('mmcv')) != 1:
        return []
    error = _failed(env, 'mmcv', 'mmcv operators')
    if not error:
        return []
    if 'mmcv-lite' in env.versions:
        what = 'mmcv-lite has no operators, which detection needs'
        return [Problem(what, f'{PIP} uninstall -y mmcv-lite && {_install(env, "mmcv")}')]
    if "'mmcv._ext'" in error:
        what = 'mmcv was built out of sight of torch: it lacks the operators that detection needs'
    elif 'mmcv operators' in env.errors:
        what = f"mmcv's operators were compiled for another torch ({error})"
    else:
        what = f"mmcv's operators do not work on every device ({error})"
    return [Problem(what, _install(env, 'mmcv'))]


def _failed(env: Environment, package: str, name: str) -> str:
    """Why the operators of a package fail on some device, '' if they do not."""
    errors = {device: error for (key, device), error in env.operators.items() if key == package}
    failures = [f'on {device}: {error}' for device, error in errors.items() if error]
    return env.errors.get(name) or ', '.join(failures)


def _serves(built: str, architecture: str) -> bool:
    """Whether code for ``built`` runs on a GPU: of its generation and not newer, or to be translated."""
    kind, _, code = built.partition('_')
    code, wanted = re.sub(r'\D', '', code), architecture[3:]
    if kind == 'compute':
        return int(code) <= int(wanted)
    return code[:-1] == wanted[:-1] and int(code) <= int(wanted)


def _is_needed(env: Environment, name: str) -> bool:
    if name in TASKS:
        return bool(env.distributions(name))
    if name == 'timm':
        return 'timm' in env.versions
    return name != 'mmcv operators'  # have a check of their own


def _again(env: Environment, name: str) -> str:
    """Command that installs what an import of :data:`IMPORTS` comes from once more."""
    again = f'{PIP} install --force-reinstall --no-deps'
    if name == 'mmlinglo':
        return 'python -c "import mmlinglo.models"    # shows where it fails'
    if name == 'cv2':  # opencv-python needs libGL, which a server may lack
        return f'{PIP} uninstall -y opencv-python && {again} opencv-python-headless'
    distribution = (env.distributions(name) if name in TOOLBOXES else [name])[0]
    if distribution not in env.versions:
        return f'{PIP} install {distribution}'
    return f'{again} {distribution}=={_plain(env.versions[distribution])}'


def _install(env: Environment, name: str) -> str:
    """Command that installs a part of the stack that is there; mmcv compiled against its torch."""
    requirement = env.stack[name]
    if name != 'mmcv':
        return f'{PIP} install {requirement}'
    on_gpu = 'FORCE_CUDA=1 ' if env.gpus else ''
    if env.gpus:
        capabilities = sorted({f'{code[3:-1]}.{code[-1]}' for _, code in env.gpus})
        on_gpu += f"TORCH_CUDA_ARCH_LIST='{' '.join(capabilities)}' "
    return (
        f"{PIP} install 'setuptools>=77.0.3,<80' wheel ninja psutil && MMCV_WITH_OPS=1 {on_gpu}{PIP} "
        f'install --force-reinstall --no-deps --no-cache-dir --no-build-isolation {requirement}'
    )


def _torchvision_for(torch: str) -> str:
    """Version of torchvision that belongs to a version of torch 2."""
    _, minor, patch = (*torch.split('.'), '0', '0')[:3]
    return f'0.{int(minor) + 15}.{patch}'


def _name(requirement: str) -> str:
    return requirement.partition('==')[0]


def _plain(version: str) -> str:
    return version.partition('+')[0]


def report(env: Environment, problems: List[Problem]) -> str:
    """What is printed: a line for each part, then the problems with the lines to run."""
    lines = {'Python': env.python}
    for name in ('torch', 'torchvision', 'numpy', 'timm'):
        lines[name] = _state(env, name, [name] if name in env.versions else [])
    if env.cuda is not None:
        lines['torch'] += f', built for CUDA {env.cuda}'
    lines['GPUs'] = ', '.join(f'{name} ({code})' for name, code in env.gpus) or 'none'
    for name in TOOLBOXES:
        lines[name] = _state(env, name, env.distributions(name))
        if name in TASKS and not env.distributions(name):
            lines[name] += f' (needed for {TASKS[name]})'
    if 'mmcv' not in env.errors:
        good = [
            device for (package, device), e in env.operators.items() if (package, e) == ('mmcv', '')
        ]
        lines['mmcv'] += f'; operators work on: {", ".join(good) or "no device"}'
    stack = 'original OpenMMLab' if env.original else 'maintained forks (onedl-*)'
    lines['stack'] = stack if any(map(env.distributions, TOOLBOXES)) else 'none'
    lines['mmlinglo'] = _state(env, 'mmlinglo', ['mmlinglo'] if 'mmlinglo' in env.versions else [])
    lines['mmlinglo'] += f', in {Path(__file__).parent}'
    lines.update(env.details)
    width = max(map(len, lines)) + 2
    text = [f'{name.ljust(width)}{value}' for name, value in lines.items()]
    if not problems:
        return '\n'.join([*text, '', 'No problem found.'])
    text += ['', f'{len(problems)} problem{"s" * (len(problems) > 1)}, to be solved in this order:']
    for number, problem in enumerate(problems, 1):
        text += [f'{number}. {problem.what}', f'   run: {problem.run}']
    return '\n'.join(text)


def _state(env: Environment, name: str, distributions: List[str]) -> str:
    """Versions of a part and what keeps it from being imported."""
    installed = ', '.join(
        env.versions[d] if d == name else f'{d} {env.versions[d]}' for d in distributions
    )
    error = env.errors.get(name)
    if not error:
        return installed or 'not installed, imported from its folder'
    return f'{installed}, FAILS: {error}' if installed else 'not installed'


def main() -> None:
    env = collect()
    problems = find_problems(env)
    print(report(env, problems))  # noqa: T201
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
