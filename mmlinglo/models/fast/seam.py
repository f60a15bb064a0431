# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The one place where it is decided whether a layer runs as the paper writes it or rewritten."""

from contextlib import contextmanager
from typing import ContextManager, Iterator, Optional, Tuple, Type

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_switched_on = True
# Layers whose call does what their weights say, and nothing else. Subclasses are not among them.
PLAIN_LAYERS = [  # a list, since torch.compile of torch 2.5 knows no sets
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.GELU,
    nn.Identity,
    nn.Linear,
    nn.ModuleList,
    nn.Sequential,
    nn.Softmax,
    nn.SyncBatchNorm,
]


def literal() -> ContextManager[None]:
    """Run all layers as the paper writes them: ``with mmlinglo.literal(): model(x)``.

    For debugging, and as the reference of tests and benchmarks. It holds for all threads.
    """
    return switch(False)


def is_switched_on() -> bool:
    """Whether rewritings may run: outside of :func:`literal`."""
    return _switched_on


@contextmanager
def switch(on: bool) -> Iterator[None]:
    """Run rewritings or not, whatever holds outside."""
    global _switched_on
    before, _switched_on = _switched_on, on
    try:
        yield
    finally:
        _switched_on = before


class Rewriting(nn.Module):
    """Base before a class of :mod:`mmlinglo.models.network`, its definition.

    A subclass gives :meth:`rewrite`, with the parameters of the definition. The definition runs
    wherever it could differ: for a layer that was exchanged, wrapped, subclassed, pruned,
    parametrized, quantized or hooked, under the transforms of :mod:`torch.func`, and
    in forward-mode differentiation.
    """

    fast: Optional[bool] = None
    """Whether to rewrite: None for on a CPU only, where it was measured; True for on every device."""
    parts: Tuple[Tuple[str, Type[nn.Module]], ...] = ()
    """Layers whose work :meth:`rewrite` does itself, and what they must be for that."""

    def __init_subclass__(cls, plain: bool = False) -> None:
        super().__init_subclass__()
        if plain:
            PLAIN_LAYERS.append(cls)

    def rewrite(self, x: Tensor) -> Optional[Tensor]:
        """Output of the definition to rounding; None where the definition should run instead."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Run the rewriting where it is exact and pays, else the definition."""
        out = self.rewrite(x) if self._may_rewrite(x) else None
        return super().forward(x) if out is None else out

    def _may_rewrite(self, x: Tensor) -> bool:
        if not _switched_on or self.fast is False or not isinstance(x, Tensor):
            return False
        if self.fast is None and x.device.type != 'cpu':
            return False
        if not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        ):
            return False
        if (
            torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        ):
            return False
        return is_plain(self) and all(
            type(self._modules[name]) is kind for name, kind in self.parts
        )


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module does what its weights say, and nobody looks on or changes it."""
    if (
        type(module) not in PLAIN_LAYERS
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__  # patched on the instance
        or module.__dict__.get('approximate', 'none') != 'none'  # of GELU
    ):
        return False
    for param in module._parameters.values():
        if type(param) is not nn.Parameter and is_traceable_wrapper_subclass(param):
            return False
    for child in module._modules.values():
        if child is None or not is_plain(child):
            return False
    return True
