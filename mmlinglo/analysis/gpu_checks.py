# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What must be known about a GPU before anything is trained on it: is it right, what is faster.

All of it also runs on a CPU, for rehearsal.
"""

import copy
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from mmlinglo import LinGlo
from mmlinglo.analysis.benchmark import make_step, time_steps
from mmlinglo.analysis.launches import FORMS, GroupedLinGlo, build_form, set_form
from mmlinglo.analysis.memory import MIB
from mmlinglo.models import ConditionalPositionalEncoding
from mmlinglo.models.fast import gpu
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
CHECK_COLUMNS = dict(
    check='Check', form='Form', error='Error', at_most='At most', verdict='Verdict'
)
FORM_COLUMNS = dict(
    model='Backbone',
    form='Form',
    dtype='Type',
    images='Images',
    step_ms='Step [ms]',
    ratio='Over plain',
    peak_memory_mib='Peak memory [MiB]',
)
RECIPE_COLUMNS = dict(
    recipe='Recipe', amp='AMP', images='Images', step_ms='Step [ms]', peak_memory_mib='Peak [MiB]'
)
RECIPES = {
    'RetinaNet': ('coco/retinanet_linglo-b0_fpn_1x_coco.py', 2, (800, 1344)),
    'SemanticFPN': ('ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512.py', 4, (512, 512)),
}


def check_all(device: str, arch: Any = 'b0', size: int = 96) -> Iterator[dict]:
    """Compare every variant on a device with float64 on the CPU, form by form.

    Args:
        device: ``'cuda'``, or ``'cpu'`` for rehearsal.
        arch: Of :class:`~mmlinglo.LinGlo`.
        size: Height and width of the images in pixels.

    Yields:
        Rows with :data:`CHECK_COLUMNS`.
    """
    yield from _check_kernels(device)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for name, kwargs in VARIANTS.items():
        reference = LinGlo(arch, fast=False, img_size=size, **kwargs).double()
        for training in (True, False):
            mode = 'training' if training else 'evaluation'
            expected = _run(copy.deepcopy(reference).train(training), x)
            for form in FORMS:
                model = _in_form(form, reference, arch, img_size=size, **kwargs)
                model = model.train(training).to(device, torch.float32)
                found = _run(model, x.to(device, torch.float32))
                yield _verdict(f'{name}, {mode}', form, _error(found, expected), AT_MOST)
    reference = LinGlo(arch, fast=False).double()
    yield from _check_half(device, arch, reference, x)
    yield from _check_other_ways(device, arch, reference, x)


def _check_kernels(device: str) -> Iterator[dict]:
    """Each kernel of :mod:`mmlinglo.models.fast.gpu` against its eager form, in float64 on the CPU.

    Maps have one line, odd sizes, and several programs in each direction. Where the kernels cannot run,
    the eager form does in their place, and the sums for the weights are left out.
    """
    shapes = (4, 24, 1, 5), (2, 24, 7, 9), (2, 72, 101, 67)
    layouts = torch.contiguous_format, torch.channels_last
    for dtype, shape, layout in product(KERNEL_AT_MOST, shapes, layouts):
        if torch.device(device).type == 'cpu' and dtype == torch.float16:
            continue
        x = (torch.randn(shape) + 1).to(dtype).contiguous(memory_format=layout)
        head = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        errors: Dict[str, float] = {}
        moments = [_moments_and_gradient(x.to(device)), _moments_and_gradient(x.double())]
        errors['product_sums, moments'] = _error(moments[0][:2], moments[1][:2])
        errors['moments_backward, input_gradient'] = _error(moments[0][2:], moments[1][2:])
        encoding = ConditionalPositionalEncoding(shape[1]).train()
        encoding.fast = True
        twin = copy.deepcopy(encoding).double()
        encoding = encoding.to(device)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            found = _encode(encoding, x.to(device), head.to(device))
        expected = _encode(twin, x.double(), head.double())
        errors['fuse, output'] = _error(found[:1], expected[:1])
        statistics = [[*e.buffers()] for e in (encoding, twin)]
        errors['fuse, running statistics'] = _error(*statistics)
        errors['fuse_backward'] = _error(found[2:], expected[2:])
        errors['input_gradient, with the convolution'] = _error(found[1:2], expected[1:2])
        if gpu.is_usable(x.to(device)):
            sums = gpu.weight_sums(head.to(device), x.to(device)).sum(0)
            kernel = (shape[1], 1, 3, 3)
            exact = conv2d_weight(x.double(), kernel, head.double(), padding=1, groups=shape[1])
            exact = torch.cat([exact.flatten(1).t(), head.double().sum((0, 2, 3))[None]])
            errors['weight_sums'] = _error([sums], [exact])
        kind = 'channels-last' if layout is torch.channels_last else 'contiguous'
        name = f'{str(dtype).removeprefix("torch.")}, {" x ".join(map(str, shape))}, {kind}'
        for kernels, error in errors.items():
            yield _verdict(f'{kernels}: {name}', 'rewritten', error, KERNEL_AT_MOST[dtype])


def _moments_and_gradient(x: Tensor) -> List[Tensor]:
    x = x.detach().requires_grad_()
    moments = patch_moments(x)
    loss = torch.cat([moment.flatten() for moment in moments]).square().sum()
    return [*moments, *torch.autograd.grad(loss, x)]


def _encode(encoding: nn.Module, x: Tensor, head: Tensor) -> List[Tensor]:
    """Output of an encoding, and gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    out = encoding(x)
    return [out, *torch.autograd.grad((out * head).sum(), [x, *encoding.parameters()])]


def _check_half(device: str, arch: Any, reference: LinGlo, x: Tensor) -> Iterator[dict]:
    expected = _run(copy.deepcopy(reference).train(), x)
    for dtype in (torch.float16, torch.bfloat16):
        if dtype == torch.float16 and device == 'cpu':
            continue  # bfloat16 is what a CPU's autocast is for
        errors = {}
        for form in FORMS:
            model = _in_form(form, reference, arch).train().to(device, torch.float32)
            with torch.autocast(torch.device(device).type, dtype):
                outputs = model(x.to(device, torch.float32))
            errors[form] = _error(_with_gradients(model, outputs), expected)
        name = f'autocast to {str(dtype).removeprefix("torch.")}, training, over plain'
        for form in ('grouped', 'rewritten'):
            yield _verdict(name, form, errors[form] / errors['plain'], NO_WORSE)


def _check_other_ways(device: str, arch: Any, reference: LinGlo, x: Tensor) -> Iterator[dict]:
    expected, images = _run(copy.deepcopy(reference).eval(), x), x.to(device, torch.float32)
    for form in FORMS:
        model = _in_form(form, reference, arch).eval().to(device, torch.float32)
        last = images.contiguous(memory_format=torch.channels_last)
        found = _run(model.to(memory_format=torch.channels_last), last)
        yield _verdict('channels-last images', form, _error(found, expected), AT_MOST)
        # Without a GPU a rehearsal does without the compiler, which takes minutes.
        backend = 'inductor' if torch.device(device).type == 'cuda' else 'eager'
        with torch.no_grad():
            found = list(torch.compile(model, backend=backend)(images))
            yield _verdict('torch.compile', form, _error(found, expected[: len(found)]), AT_MOST)
            model.switch_to_deploy()
            found = list(model(images))
            yield _verdict('deployed', form, _error(found, expected[: len(found)]), AT_MOST)
    yield from _check_synchronized(device, arch, reference, x)


def _check_synchronized(device: str, arch: Any, reference: LinGlo, x: Tensor) -> Iterator[dict]:
    """SyncBN in as many processes as there are GPUs, two at most; each has the same images."""
    on_gpu = torch.device(device).type == 'cuda'
    processes = min(2, torch.cuda.device_count()) if on_gpu else 1
    state = reference.float().state_dict()
    expected = _run(copy.deepcopy(reference).double().train(), x)
    # torch's SyncBatchNorm is for GPUs only; its rewriting is not.
    for form in FORMS if on_gpu else ('rewritten',):
        with tempfile.TemporaryDirectory() as folder:
            args = (processes, device, folder, form, arch, state, x)
            if processes == 1:
                _synchronized(0, *args)
            else:
                torch.multiprocessing.spawn(_synchronized, args, processes)
            for rank in range(processes):
                found = torch.load(Path(folder, f'{rank}.pt'))
                name = f'SyncBN, process {rank + 1} of {processes}'
                yield _verdict(name, form, _error(found, expected[: len(found)]), AT_MOST)


def _synchronized(
    rank: int,
    processes: int,
    device: str,
    folder: str,
    form: str,
    arch: Any,
    state: dict,
    x: Tensor,
) -> None:
    backend = 'nccl' if torch.device(device).type == 'cuda' else 'gloo'
    place = f'cuda:{rank}' if backend == 'nccl' else 'cpu'
    init = f'file://{folder}/rendezvous'
    dist.init_process_group(backend, init, world_size=processes, rank=rank)
    try:
        _no_tf32()
        model = _build(form, arch, norm_cfg=dict(type='SyncBN'))
        model.load_state_dict(state)
        outputs = model.train().to(place)(x.to(place, torch.float32))
        torch.save([out.detach().cpu() for out in outputs], os.path.join(folder, f'{rank}.pt'))
    finally:
        dist.destroy_process_group()


def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _build(form: str, arch: Any, **kwargs: Any) -> LinGlo:
    kind = GroupedLinGlo if form == 'grouped' else LinGlo
    return set_form(kind(arch, **kwargs), form)


def _in_form(form: str, reference: LinGlo, arch: Any, **kwargs: Any) -> LinGlo:
    _no_tf32()
    model = _build(form, arch, **kwargs)
    model.load_state_dict(reference.state_dict())
    return model


def _run(model: nn.Module, x: Tensor) -> List[Tensor]:
    outputs = model(x)
    return _with_gradients(model, outputs)


def _with_gradients(model: nn.Module, outputs: Sequence[Tensor]) -> List[Tensor]:
    """The outputs and, of all parameters together, the gradient of the mean of their squares."""
    losses = [(out.float() if out.dtype.itemsize < 4 else out).square().mean() for out in outputs]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    return [*(out.detach() for out in outputs), torch.cat([g.flatten() for g in gradients])]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative error of any of the tensors, in the Euclidean norm."""
    pairs = [(a.detach().cpu().double(), b.detach().double()) for a, b in zip(found, expected)]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def _verdict(check: str, form: str, error: float, at_most: float) -> dict:
    verdict = 'met' if error <= at_most else 'missed'
    return dict(check=check, form=form, error=error, at_most=at_most, verdict=verdict)


def measure_forms(
    device: str, models: Sequence[str], images: Sequence[Tuple[int, int, int]], rounds: int
) -> Iterator[dict]:
    """Time a training step of LinGlo in each form, and of PVTv2, in float32 and under autocast to bfloat16.

    Args:
        device: ``'cuda'`` or ``'cpu'``.
        models: Keys of :data:`~mmlinglo.analysis.peers.ALL`.
        images: Number, height and width in pixels.
        rounds: Of timing, at least 2.

    Yields:
        Rows with :data:`FORM_COLUMNS`; peak memory on a GPU only, None where it does not fit.
    """
    for name in models:
        for (number, height, width), autocast in product(images, (False, True)):
            x = torch.randn(number, 3, height, width, device=device)
            steps: Dict[str, Callable] = {}
            peaks: Dict[str, Any] = {}
            for form in FORMS if name.startswith('linglo_b') else ['plain']:
                model = build_form(name, (height, width), 'train', form).to(device)
                step = make_step(model, x, train_step=True, autocast=autocast)
                peaks[form], fits = _peak(step, device)
                if fits:
                    steps[form] = step
            times = time_steps(steps, rounds) if steps else {}
            for form, peak in peaks.items():
                median = times[form][1] if form in times else None
                ratio = median / times['plain'][1] if median and 'plain' in times else None
                row = dict(model=name, form=form, dtype='bf16' if autocast else 'fp32')
                row['images'] = f'{number} x {height} x {width}'
                yield dict(row, step_ms=median, ratio=ratio, peak_memory_mib=peak)


def _peak(step: Callable, device: str) -> Tuple[Any, bool]:
    """Peak memory in MiB of a step on a GPU, and whether it fits."""
    if torch.device(device).type != 'cuda':
        return None, True
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step()
    except torch.OutOfMemoryError:
        return None, False
    return torch.cuda.max_memory_allocated() / MIB, True


def measure_recipes(device: str, root: Path, small: bool, rounds: int) -> Iterator[dict]:
    """Time training steps of the real recipes, with their optimizers, on random images and labels.

    Args:
        device: ``'cuda'`` or ``'cpu'``.
        root: The checkout.
        small: Whether to take two small images, for rehearsal.
        rounds: Of timing, at least 2.

    Yields:
        Rows with :data:`RECIPE_COLUMNS`.

    Raises:
        ModuleNotFoundError: If a toolbox is missing.
    """
    from mmengine.optim import build_optim_wrapper

    for recipe, (config, batch_size, shape) in RECIPES.items():
        if small:
            batch_size, shape = 2, (64, 64)
        cfg = Config.fromfile(root / 'configs' / config)
        on_gpu = torch.device(device).type == 'cuda'
        for amp in (False, True) if on_gpu else (False,):  # mmengine has AMP on GPUs only
            model = build_model(cfg).to(device).train()
            wrapper = dict(cfg.optim_wrapper)
            if amp:
                wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
            optim = build_optim_wrapper(model, wrapper)
            data = _random_batch(cfg.default_scope, batch_size, shape)

            def step(model: nn.Module = model, optim: Any = optim, data: dict = data) -> None:
                model.train_step(data, optim)

            peak, fits = _peak(step, device)
            median = time_steps(dict(step=step), rounds)['step'][1] if fits else None
            images = '{} x {} x {}'.format(batch_size, *shape)
            row = dict(recipe=recipe, amp='bf16' if amp else 'none', images=images)
            yield dict(row, step_ms=median, peak_memory_mib=peak)


def _random_batch(scope: str, batch_size: int, shape: Tuple[int, int]) -> dict:
    """Images and labels as a data loader of COCO or of ADE20K gives them."""
    height, width = shape
    inputs = [torch.randint(256, (3, height, width), dtype=torch.uint8) for _ in range(batch_size)]
    names = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    meta = dict(dict.fromkeys(names, shape), scale_factor=(1.0, 1.0))
    samples = []
    for _ in inputs:
        if scope == 'mmdet':
            from mmdet.structures import DetDataSample
            from mmdet.structures.bbox import HorizontalBoxes

            corners = torch.rand(8, 2) * torch.tensor([width / 2, height / 2])
            sizes = 8 + torch.rand(8, 2) * torch.tensor([width / 2 - 8, height / 2 - 8])
            boxes = HorizontalBoxes(torch.cat([corners, corners + sizes], dim=1))
            truth = InstanceData(bboxes=boxes, labels=torch.randint(80, (8,)))
            sample = DetDataSample(gt_instances=truth)
        else:
            from mmseg.structures import SegDataSample

            labels = torch.randint(150, (1, height, width))
            sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        sample.set_metainfo(meta)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)
