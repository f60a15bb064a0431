# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What must be known about a GPU before anything is trained on it: is it right, what is faster.

All of it also runs on a CPU, for rehearsal.
"""

import copy
import tempfile
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from torch import Tensor, nn

from mmlinglo import LinGlo
from mmlinglo.analysis.benchmark import Step, make_step, time_steps
from mmlinglo.analysis.launches import FORMS, GroupedLinGlo, build_form, set_form
from mmlinglo.analysis.memory import measure_first_step
from mmlinglo.models import ConditionalPositionalEncoding
from mmlinglo.models.fast.patch_moments import patch_moments
from mmlinglo.utils.deploy import build_model

VARIANTS: Dict[str, dict] = {
    'RP-CPE': {},
    'CPE': dict(pos_encoding='CPE'),
    'P-CPE': dict(pos_encoding='P-CPE'),
    'R-CPE': dict(pos_encoding='R-CPE'),
    'absolute': dict(pos_encoding='absolute'),
    'no encoding': dict(pos_encoding=None),
    'C-C-H-H': dict(layout='C-C-H-H'),
    'dot product': dict(attention='dot_product'),
    'patches': dict(overlap=False),
    'no norm': dict(norm_cfg=None),
    'GroupNorm': dict(norm_cfg=dict(type='GN', num_groups=4)),
    'with_cp': dict(with_cp=True),
    'channels-last maps': dict(channels_last=True),
}
AT_MOST = 1e-3
"""Relative error in float32 of outputs and gradients, against float64 on the CPU."""
KERNEL_AT_MOST = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative error of a kernel, by the type of the maps, which gradients are rounded to."""
NO_WORSE = 2.0
"""Error in half precision over that of the network as the paper writes it, which has one too."""
RECIPES: Dict[str, Tuple[str, Tuple[int, int, int]]] = {
    'RetinaNet': ('coco/retinanet_linglo-b0_fpn_1x_coco.py', (2, 800, 1344)),
    'SemanticFPN': ('ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py', (4, 512, 512)),
}
"""Config, and number, height and width of the images, by name."""


def check_all(device: str, arch: Any = 'b0', size: int = 96) -> Iterator[dict]:
    """Compare every variant on a device with float64 on the CPU, form by form.

    Args:
        device: ``'cuda'``, or ``'cpu'`` for rehearsal.
        arch: Of :class:`~mmlinglo.LinGlo`.
        size: Height and width of the images in pixels.

    Yields:
        Rows with the check and the form, its error, the largest allowed, and ``'met'`` or ``'missed'``.
    """
    x = torch.randn(2, 3, size, size, dtype=torch.float64)

    def compare(way: Callable, training: bool, **kwargs: Any) -> Iterator[Tuple[str, float]]:
        """Errors of the forms, executed in some way."""
        reference = LinGlo(arch, fast=False, img_size=size, **kwargs).double().train(training)
        state = copy.deepcopy(reference.state_dict())
        expected = _run(reference, x)
        for form in FORMS:
            model = _build(form, arch, state, img_size=size, **kwargs).train(training)
            found = way(model.to(device), x.to(device, torch.float32))
            yield form, _error(found, expected)

    yield from _check_kernels(device)
    for (name, kwargs), training in product(VARIANTS.items(), (True, False)):
        mode = 'training' if training else 'evaluation'
        for form, error in compare(_run, training, **kwargs):
            yield _verdict(f'{name}, {mode}', form, error, AT_MOST)
    for dtype in _half_types(device):
        errors = dict(compare(partial(_run, dtype=dtype), True))
        name = f'autocast to {str(dtype).removeprefix("torch.")}, training, over plain'
        for form in ('grouped', 'rewritten'):
            yield _verdict(name, form, errors[form] / errors['plain'], NO_WORSE)
    for name, way in WAYS.items():
        for form, error in compare(way, False):
            yield _verdict(name, form, error, AT_MOST)
    yield from _check_synchronized(device, arch, x)


def _half_types(device: str) -> List[torch.dtype]:
    """Types of autocast; that of a CPU is for bfloat16."""
    on_gpu = torch.device(device).type == 'cuda'
    return [torch.float16, torch.bfloat16] if on_gpu else [torch.bfloat16]


def _check_kernels(device: str) -> Iterator[dict]:
    """Each kernel of :mod:`mmlinglo.models.fast.gpu` against its eager form, in float64 on the CPU.

    Maps have one line, odd sizes, and several programs in each direction. Where the kernels cannot run,
    the eager form does in their place.
    """
    dtypes = [torch.float32, *_half_types(device)]
    shapes = (4, 24, 1, 5), (2, 24, 7, 9), (2, 72, 101, 67)
    layouts = {'contiguous': torch.contiguous_format, 'channels-last': torch.channels_last}
    for dtype, shape, (layout, memory_format) in product(dtypes, shapes, layouts.items()):
        x, head = ((torch.randn(shape) + mean).to(dtype) for mean in (1, 0))
        maps = [each.contiguous(memory_format=memory_format) for each in (x, head)]
        encoding = ConditionalPositionalEncoding(shape[1]).train()
        encoding.fast = True
        expected = _use_kernels(copy.deepcopy(encoding).double(), *(each.double() for each in maps))
        found = _use_kernels(encoding.to(device), *(each.to(device) for each in maps))
        name = f'{str(dtype).removeprefix("torch.")}, {" x ".join(map(str, shape))}, {layout}'
        for kernels, tensors in expected.items():
            error = _error(found[kernels], tensors)
            yield _verdict(f'{kernels}: {name}', 'rewritten', error, KERNEL_AT_MOST[dtype])


def _use_kernels(encoding: nn.Module, x: Tensor, head: Tensor) -> Dict[str, Sequence[Tensor]]:
    """What the kernels compute, by their names."""
    x = x.detach().requires_grad_()
    moments = patch_moments(x)
    loss = torch.cat([moment.flatten() for moment in moments]).square().sum()
    is_half = x.dtype.itemsize < 4
    with torch.autocast(x.device.type, x.dtype if is_half else None, enabled=is_half):
        out = encoding(x)
    gradients = torch.autograd.grad((out * head).sum(), [x, *encoding.parameters()])
    return {
        'product_sums, moments': moments,
        'moments_backward, input_gradient': torch.autograd.grad(loss, x),
        'fuse, output': [out],
        'fuse, running statistics': [*encoding.buffers()],
        'input_gradient, with the convolution': gradients[:1],
        'weight_sums, fuse_backward': gradients[1:],
    }


def _check_synchronized(device: str, arch: Any, x: Tensor) -> Iterator[dict]:
    """SyncBN in as many processes as there are GPUs, two at most; each has the same images."""
    on_gpu = torch.device(device).type == 'cuda'
    processes = min(2, torch.cuda.device_count()) if on_gpu else 1
    reference = LinGlo(arch, fast=False)
    state = copy.deepcopy(reference.state_dict())
    expected = _run(reference.double(), x)
    # torch's SyncBatchNorm is for GPUs only; its rewriting is not.
    for form in FORMS if on_gpu else ('rewritten',):
        with tempfile.TemporaryDirectory() as folder:
            args = (processes, on_gpu, folder, form, arch, state, x)
            torch.multiprocessing.spawn(_synchronize, args, processes)
            for rank in range(processes):
                error = _error(torch.load(Path(folder, f'{rank}.pt')), expected)
                yield _verdict(f'SyncBN, process {rank + 1} of {processes}', form, error, AT_MOST)


def _synchronize(
    rank: int,
    processes: int,
    on_gpu: bool,
    folder: str,
    form: str,
    arch: Any,
    state: dict,
    x: Tensor,
) -> None:
    """Write the maps and the gradient of a process."""
    backend, place = ('nccl', f'cuda:{rank}') if on_gpu else ('gloo', 'cpu')
    init = f'file://{folder}/rendezvous'
    dist.init_process_group(backend, init, world_size=processes, rank=rank)
    try:
        model = _build(form, arch, state, norm_cfg=dict(type='SyncBN')).train().to(place)
        found = _run(model, x.to(place, torch.float32))
        torch.save([each.detach().cpu() for each in found], Path(folder, f'{rank}.pt'))
    finally:
        dist.destroy_process_group()


def _build(form: str, arch: Any, state: dict, **kwargs: Any) -> LinGlo:
    """A model of float32 with the weights of another one; TF32 is turned off."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    kind = GroupedLinGlo if form == 'grouped' else LinGlo
    model = set_form(kind(arch, **kwargs), form)
    model.load_state_dict(state)
    return model


def _run(model: nn.Module, x: Tensor, dtype: Any = None) -> List[Tensor]:
    """The outputs and, of all parameters together, the gradient of the mean of their squares."""
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        outputs = model(x)
    losses = [(out.float() if out.dtype.itemsize < 4 else out).square().mean() for out in outputs]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    return [*outputs, torch.cat([gradient.flatten() for gradient in gradients])]


def _run_channels_last(model: Any, x: Tensor) -> List[Tensor]:
    layout = torch.channels_last
    return _run(model.to(memory_format=layout), x.contiguous(memory_format=layout))


@torch.no_grad()
def _run_compiled(model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    # Without a GPU a rehearsal does without the compiler, which takes minutes.
    return torch.compile(model, backend='inductor' if x.is_cuda else 'eager')(x)


@torch.no_grad()
def _run_deployed(model: LinGlo, x: Tensor) -> Sequence[Tensor]:
    model.switch_to_deploy()
    return model(x)


WAYS: Dict[str, Callable] = {
    'channels-last images': _run_channels_last,
    'torch.compile': _run_compiled,
    'deployed': _run_deployed,
}
"""Ways to execute a model in evaluation mode."""


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative error of any of the tensors found, in the Euclidean norm."""
    pairs = [(a.detach().cpu().double(), b.detach().double()) for a, b in zip(found, expected)]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def _verdict(check: str, form: str, error: float, at_most: float) -> dict:
    verdict = 'met' if error <= at_most else 'missed'
    return dict(check=check, form=form, error=error, at_most=at_most, verdict=verdict)


def measure_forms(
    device: str, models: Sequence[str], images: Sequence[Tuple[int, int, int]], rounds: int
) -> Iterator[dict]:
    """Measure training steps of LinGlo in each form, and of PVTv2, in float32 and under autocast to bfloat16.

    Args:
        device: ``'cuda'``, or ``'cpu'`` for rehearsal.
        models: Keys of :data:`~mmlinglo.analysis.peers.ALL`.
        images: Number, height and width in pixels.
        rounds: Of timing, at least 2.

    Yields:
        Rows with the units in the names; None where it does not fit into memory.
    """
    for name, size, autocast in product(models, images, (False, True)):
        x = torch.randn(size[0], 3, *size[1:], device=device)
        forms = FORMS if name.startswith('linglo_b') else ['plain']
        builders = {form: partial(_build_step, name, form, x, autocast) for form in forms}
        yield from _measure(name, autocast, size, builders, device, rounds)


def measure_recipes(device: str, root: Path, small: bool, rounds: int) -> Iterator[dict]:
    """Measure training steps of the real recipes, with their optimizers, on random images and labels.

    Args:
        device: ``'cuda'``, or ``'cpu'`` for rehearsal.
        root: The checkout.
        small: Whether to take two small images, for rehearsal.
        rounds: Of timing, at least 2.

    Yields:
        Rows as :func:`measure_forms`.

    Raises:
        ModuleNotFoundError: If a toolbox is missing.
    """
    # mmengine has AMP on GPUs only.
    amps = (False, True) if torch.device(device).type == 'cuda' else (False,)
    for (name, (config, size)), amp in product(RECIPES.items(), amps):
        size = (2, 64, 64) if small else size
        cfg = Config.fromfile(root / 'configs' / config)
        if amp:
            cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
        data = (_random_scenes if cfg.default_scope == 'mmdet' else _random_regions)(*size)
        builders = dict(plain=partial(_build_recipe_step, cfg, data, device))
        yield from _measure(name, amp, size, builders, device, rounds)


def _measure(
    model: str, amp: bool, size: Sequence[int], builders: dict, device: str, rounds: int
) -> Iterator[dict]:
    """Peak memory of the first steps, and then the median time of those that fit."""
    peaks = {}
    for form, build in builders.items():
        with suppress(torch.OutOfMemoryError):
            peaks[form] = measure_first_step(build, device)[0]
    times = time_steps({form: builders[form]() for form in peaks}, rounds)
    for form in builders:
        row = dict(model=model, form=form, dtype='bf16' if amp else 'fp32')
        median = times[form][1] if form in times else None
        ratio = median / times['plain'][1] if median and 'plain' in times else None
        row.update(images=' x '.join(map(str, size)), step_ms=median, ratio=ratio)
        yield dict(row, peak_memory_mib=peaks.get(form))


def _build_step(name: str, form: str, x: Tensor, autocast: bool) -> Step:
    model = build_form(name, (x.shape[2], x.shape[3]), 'train', form).to(x.device)
    return make_step(model, x, train_step=True, autocast=autocast)


def _build_recipe_step(cfg: Config, data: dict, device: str) -> Step:
    model: Any = build_model(cfg).to(device).train()
    return partial(model.train_step, data, build_optim_wrapper(model, cfg.optim_wrapper))


def _random_scenes(number: int, height: int, width: int) -> dict:
    """Images and boxes as a data loader of COCO gives them."""
    from mmdet.testing import demo_mm_inputs

    options = dict(num_items=[8] * number, num_classes=80, use_box_type=True)
    return demo_mm_inputs(number, (3, height, width), **options)


def _random_regions(number: int, *shape: int) -> dict:
    """Images and labels as a data loader of ADE20K gives them."""
    from mmseg.structures import SegDataSample

    meta = dict(img_shape=shape, ori_shape=shape)
    labels = [PixelData(data=torch.randint(150, (1, *shape))) for _ in range(number)]
    samples = [SegDataSample(gt_sem_seg=each, metainfo=meta) for each in labels]
    return dict(inputs=[*torch.randint(256, (number, 3, *shape)).byte()], data_samples=samples)
