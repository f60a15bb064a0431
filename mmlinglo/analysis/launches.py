# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What one step of a model asks of a GPU, counted on a machine without one.

The step runs on CUDA tensors without data (torch's FakeTensorMode), and a dispatch mode counts the
operations under it. Autograd's engine refuses such tensors, because it asks for the device's stream.
So the nodes of autograd's graph are called here one by one: they are torch's own, and so are the
operations in them, also in custom functions and checkpointed blocks.
"""

import copy
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmlinglo import LinGlo
from mmlinglo.analysis.memory import MIB
from mmlinglo.analysis.peers import STAGES, Plain, build_backbone
from mmlinglo.models.fast import Rewriting
from mmlinglo.models.fast.grouped import GroupedPositionalEncoding
from mmlinglo.utils.deploy import switch_to_deploy

BANDWIDTH = 3.35e12  # bytes a second of an H100 SXM's memory, by its data sheet
LAUNCH_SECONDS = 4e-6  # that launching a kernel takes at least
OLDEST_TORCH = '2.10'
AMP = {'none': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}
MODES = ('train', 'eval', 'deploy')
FORMS = {
    'plain': 'as the paper writes it, which is the default on a GPU',
    'grouped': 'the branches of an encoding as one convolution, in training',
    'rewritten': 'with all rewritings, fast=True',
}
"""How LinGlo's layers are computed, and what that means."""
COMPILED = ('fused_kernels', 'library_calls')
"""Columns of :func:`count_compiled_kernels`."""
# Operators without a kernel, besides views; by name, without leading underscores.
WITHOUT_KERNEL = frozenset(
    'device detach alias lift_fresh unsafe_view empty empty_like empty_strided new_empty '
    'new_empty_strided resize_ set_ record_stream'.split()
)
# Operators whose result the host must know before it can go on.
WAITING = frozenset(
    'local_scalar_dense nonzero masked_select unique unique2 unique_consecutive unique_dim equal '
    'is_all_true is_any_true assert_async'.split()
)


@dataclass
class Counts:
    """What was counted in a forward or a backward pass.

    Attributes:
        host_copies: Copies between the memory of the CPU and of the GPU.
        syncs: Operations whose result the CPU waits for, copies to the CPU among them.
        bytes_moved: Sizes in bytes of the inputs and outputs of all launches.
        operators: Launches of each operator: operations on the GPU that are no views. One may be
            several kernels.
    """

    host_copies: int = 0
    syncs: int = 0
    bytes_moved: int = 0
    operators: Counter = field(default_factory=Counter)

    def __add__(self, other: 'Counts') -> 'Counts':
        return Counts(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    @property
    def launches(self) -> int:
        return sum(self.operators.values())

    @property
    def lower_bound_ms(self) -> float:
        """Milliseconds that an H100 needs at least to move the bytes, or to launch the operations."""
        return 1e3 * max(self.bytes_moved / BANDWIDTH, self.launches * LAUNCH_SECONDS)


@dataclass
class StepCounts:
    """What was counted in a step; ``saved_bytes`` are kept from the forward for the backward."""

    forward: Counts
    backward: Counts
    saved_bytes: int

    def row(self) -> dict:
        """Line of a report."""
        both = self.forward + self.backward
        return dict(
            forward_launches=self.forward.launches,
            backward_launches=self.backward.launches,
            host_copies=both.host_copies,
            syncs=both.syncs,
            moved_gb=both.bytes_moved / 1e9,
            saved_mib=self.saved_bytes / MIB,
            lower_bound_ms=both.lower_bound_ms,
        )


class GroupedLinGlo(LinGlo):
    """LinGlo with :class:`~mmlinglo.models.fast.grouped.GroupedPositionalEncoding`."""

    encoding = GroupedPositionalEncoding


def set_form(model: nn.Module, form: str) -> nn.Module:
    """Have LinGlo run in one of :data:`FORMS`; for ``'grouped'`` it must be a :class:`GroupedLinGlo`."""
    switched_on = dict(grouped=GroupedPositionalEncoding, rewritten=Rewriting).get(form, ())
    for module in model.modules():
        if isinstance(module, Rewriting):
            module.fast = isinstance(module, switched_on)
    return model


def build_form(name: str, shape: Tuple[int, int], mode: str, form: str = 'plain') -> nn.Module:
    """A backbone in a mode and form, with pooled features at 224 x 224 and four maps elsewhere.

    Args:
        name: A key of :data:`~mmlinglo.analysis.peers.ALL`.
        shape: Height and width of the images in pixels.
        mode: Of :data:`MODES`; ``'deploy'`` is ``'eval'`` for what has no such form.
        form: Of :data:`FORMS`.

    Raises:
        ValueError: If the backbone, mode or form is unknown, or the form is for LinGlo only.
    """
    for what, value, allowed in (('mode', mode, MODES), ('form', form, FORMS)):
        if value not in allowed:
            raise ValueError(f'{what} must be one of {", ".join(allowed)}, got {value!r}')
    stages = () if tuple(shape) == (224, 224) else STAGES
    if form != 'plain' and not name.startswith('linglo_b'):
        raise ValueError(f'the form {form!r} is for LinGlo only, got the backbone {name!r}')
    if form == 'grouped':
        linglo = GroupedLinGlo(name.split('_')[1], out_indices=stages or -1).eval()
        model: nn.Module = Plain(linglo, bool(stages))
    else:
        model = build_backbone(name, shape, stages)
    set_form(model, form)
    if mode == 'deploy':
        switch_to_deploy(model)
    return model.train(mode == 'train')


def count_launches(
    model: nn.Module, images: Sequence[int], amp: str = 'none', channels_last: bool = False
) -> StepCounts:
    """Count one step of a model, in the mode that it is in; a backward belongs to training mode.

    The model is left as it is; its copy runs, with its parameters and buffers on the GPU. Other tensors
    stay where they are, so that a forgotten one is found.

    Args:
        model: Maps images to a tensor, or a sequence or dict of tensors.
        images: Shape of the images, (B, C, H, W).
        amp: Autocast of the forward, ``'none'``, ``'fp16'`` or ``'bf16'``.
        channels_last: Layout in memory of images and kernels.

    Raises:
        ValueError: If ``amp`` is unknown, what runs depends on the values of tensors, or PyTorch is older
            than 2.10.
        RuntimeError: If tensors of the CPU and of the GPU meet.
    """
    if amp not in AMP:
        raise ValueError(f'amp must be one of {", ".join(AMP)}, got {amp!r}')
    if TorchVersion(torch.__version__) < OLDEST_TORCH:
        raise ValueError(
            f'counting needs PyTorch {OLDEST_TORCH} or newer, got {torch.__version__}: PyTorch 2.5 aborts '
            'at convolutions of CUDA tensors without data'
        )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    forward, backward, saved = _Counter(), _Counter(), SavedTensors()
    # With symbols in place of the numbers that an .item() would give.
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        model.to_empty(device='cuda')
        x = torch.empty(*images, device='cuda').contiguous(memory_format=layout)
        try:
            with (
                torch.set_grad_enabled(model.training),
                _autocast(AMP[amp]),
                _Fused(),
                saved,
                forward,
            ):
                outputs = model(x)
            if model.training:
                outputs = [out for out in _tensors(outputs) if out.requires_grad]
                gradients = [torch.empty_like(out) for out in outputs]
                with backward:
                    run_backward(outputs, gradients)
        except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
            raise ValueError(f"what runs depends on a tensor's values: {error}") from error
        return StepCounts(forward.counts, backward.counts, saved.count_bytes(model))


def count_compiled_kernels(model: nn.Module, images: Sequence[int]) -> Tuple[int, int]:
    """Count what ``torch.compile`` makes of a forward pass on a CPU.

    Inductor generates code for CUDA only where it finds a GPU. For a CPU, it fuses by the same rules.

    Args:
        model: In evaluation mode, on a CPU.
        images: Shape of the images, (B, C, H, W).

    Returns:
        Number of fused kernels, and of matrix products and convolutions that libraries do.
    """
    torch.compiler.reset()
    with torch.inference_mode():
        _, code = run_and_get_code(torch.compile(model), torch.randn(*images))
    calls = (r'^ +cpp_fused\w*\(', r'\b(extern_kernels|torch\.ops)[.\w]*\(')
    fused, library = (len(re.findall(call, '\n'.join(code), re.MULTILINE)) for call in calls)
    return fused, library


def _autocast(dtype: Optional[torch.dtype]) -> torch.autocast:
    """Autocast on CUDA, which torch itself turns off where there is no GPU."""
    context = torch.autocast('cuda', dtype, enabled=False)
    context._enabled = dtype is not None
    return context


class _Fused(TorchFunctionMode):
    """Attention by the fused kernel that torch takes on an H100, which it does not without one."""

    def __torch_function__(self, func: Any, _: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) > 3:
            return func(*args, **kwargs)
        more = {name: value for name, value in kwargs.items() if value}
        if more.keys() - {'scale', 'dropout_p', 'is_causal'}:  # a mask
            return func(*args, **kwargs)
        if args[0].dtype == torch.float32 or args[0].shape[-1] > 256:
            options = dict(attn_bias=None, compute_log_sumexp=args[0].requires_grad, **more)
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, **options)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(*args, **more)[0]


class _Counter(TorchDispatchMode):
    """Counts the operations under it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, _: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.lstrip('_')
        if func.is_view or name in WITHOUT_KERNEL:
            return out
        inputs = _tensors(args, kwargs)
        outputs = _tensors(out)
        # A number in a tensor of the CPU goes along with the launch.
        places = {t.device.type for t in inputs if t.ndim or t.device.type == 'cuda'}
        results = {t.device.type for t in outputs}
        if 'cuda' not in places | results:
            return out
        counts = self.counts
        counts.operators[name] += 1
        counts.bytes_moved += sum(map(_size, inputs)) + sum(map(_size, outputs))
        counts.host_copies += 'cpu' in places | results
        by_mask = name in ('index', 'index_put', 'index_put_') and any(
            t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])
        )
        counts.syncs += name in WAITING or by_mask or 'cpu' in results
        return out


class SavedTensors(saved_tensors_hooks):
    """The memory that autograd keeps for the backward, each piece once, whichever tensors share it."""

    def __init__(self) -> None:
        self._storages: Dict[
            int, torch.UntypedStorage
        ] = {}  # themselves, so that no key is given to another
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._storages[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    def count_bytes(self, model: nn.Module) -> int:
        """Size in bytes of what is no parameter of the model."""
        parameters = {_storage(parameter) for parameter in model.parameters()}
        kept = self._storages.items()
        return sum(storage.nbytes() for key, storage in kept if key not in parameters)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(*trees: Any) -> List[Tensor]:
    found = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]
    return list({id(tensor): tensor for tensor in found}.values())


def _size(tensor: Tensor) -> int:
    """Bytes; of an expanded tensor, those that are in memory; 0 if its shape depends on values."""
    if not all(isinstance(size, int) for size in tensor.shape):
        return 0
    sizes = zip(tensor.shape, tensor.stride())
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


def run_backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Dict[Tensor, Tensor]:
    """Call the nodes of autograd's graph as its engine would, without asking for a device.

    Hooks of tensors and nodes are not called.

    Args:
        outputs: Tensors from which to go backward.
        gradients: Their gradients.

    Returns:
        Gradients of the leaves of the graph.
    """
    nodes = dict.fromkeys(output.grad_fn for output in outputs)  # nobody goes back from a leaf
    order: TopologicalSorter = TopologicalSorter({node: () for node in nodes})
    stack: List[Any] = list(nodes)
    while stack:
        node = stack.pop()
        for target, _ in node.next_functions:
            if target is not None:
                order.add(target, node)
                if target not in nodes:
                    nodes[target] = None
                    stack.append(target)
    order.prepare()
    ready = list(order.get_ready())
    arrived: Dict[Any, Dict[int, Tensor]] = defaultdict(dict)
    leaves: Dict[Tensor, Tensor] = {}

    def arrive(node: Any, index: int, gradient: Optional[Tensor]) -> None:
        if gradient is not None and node is not None:
            gradient = _fit(gradient, node._input_metadata[index])
            slots = arrived[node]
            slots[index] = slots[index] + gradient if index in slots else gradient

    with torch.no_grad():
        for output, gradient in zip(outputs, gradients):
            arrive(output.grad_fn, output.output_nr, gradient)
        while ready:
            node = ready.pop()  # the last one: the order of sums decides on their layout
            slots = arrived.pop(node, None)
            if slots and hasattr(node, 'variable'):
                leaves[node.variable] = _accumulate(node.variable, slots[0])
            elif slots:
                # The node of a custom function is no C++ object that could be called.
                call = getattr(node, 'apply', node)
                found = call(*map(slots.get, range(len(node._input_metadata))))
                found = found if isinstance(found, tuple) else (found,) * len(node.next_functions)
                for (target, index), gradient in zip(node.next_functions, found):
                    arrive(target, index, gradient)
            order.done(node)
            ready += order.get_ready()
    return leaves


def _accumulate(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A first gradient as autograd keeps it: a copy if its layout is not the parameter's."""
    strides = zip(parameter.shape, parameter.stride(), gradient.stride())
    if any(ours != theirs for size, ours, theirs in strides if size > 1):
        return torch.empty_like(parameter).copy_(gradient)
    return gradient


def _fit(gradient: Tensor, metadata: Any) -> Tensor:
    """As autograd's engine makes a gradient fit the tensor that it belongs to."""
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)
