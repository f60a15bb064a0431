# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights

from .. import network
from ..arguments import check_integer
from . import gpu
from .patch_moments import patch_moments
from .precision import autocast_off, full_precision
from .seam import Rewriting
from .synchronize import is_alone, synchronize_moments


class ConditionalPositionalEncoding(Rewriting, network.ConditionalPositionalEncoding, plain=True):
    r"""Conditional positional encoding (Sec. 3.2, Fig. 2) as one convolution, also in training.

    Branch i with kernel w_i is normalized by the mean m and covariance S of the 3x3 patches of
    x alone (:func:`.patch_moments.patch_moments`), whatever its own output is::

        mean_i = w_i . m,  var_i = w_i^T S w_i,  a_i = weight_i / sqrt(var_i + eps)
        out = x * (identity + sum_i a_i w_i) + sum_i (bias_i - a_i mean_i)

    so that no branch's output is computed or kept for the backward pass. With running statistics
    nothing is left to compute but the kernel, and :meth:`switch_to_deploy` fixes that for good
    (RepVGG, Diverse Branch Block). Synchronized batch norms exchange the branches' statistics.

    Where a kernel cancels nearly all that it reads, such as a Laplacian on a smooth map, so would
    w_i^T S w_i, and the definition runs. A GPU would have to wait for that question: it is not
    asked there.

    Args:
        channels: Channels C of the input and the output.
        num_branches: Parallel branches, at least 1. They and ``skip`` are the rows of Table 6:
            CPE (1, False), R-CPE (1, True), P-CPE (4, False) and RP-CPE (4, True), the default.
        skip: Whether the input is added to the branches.
        norm_layer: Makes the norm of a branch from its channels; None for no norm and
            convolutions with a bias. Batch norms are rewritten, other norms are not.
        deploy: Whether to build the fused form, one convolution named :attr:`reparam`.

    Raises:
        ValueError: If ``channels`` or ``num_branches`` is below 1.
        TypeError: If one is no integer, or ``deploy`` is asked of other norms.

    Example:
        >>> rp_cpe = ConditionalPositionalEncoding(256)
        >>> rp_cpe(torch.rand(1, 256, 56, 56)).shape
        torch.Size([1, 256, 56, 56])
    """

    kernel_size = 3
    reparam: nn.Conv2d

    def __init__(
        self,
        channels: int,
        num_branches: int = 4,
        skip: bool = True,
        norm_layer: network.NormLayer = nn.BatchNorm2d,
        deploy: bool = False,
    ) -> None:
        check_integer('channels', channels, 1)
        check_integer('num_branches', num_branches, 1)
        super().__init__(channels, num_branches, skip, norm_layer)
        self.deploy = False
        if deploy:
            self.eval().switch_to_deploy()
            self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return self.reparam(x) if self.deploy else super().forward(x)

    def rewrite(self, x: Tensor) -> Optional[Tensor]:
        if not self.is_linear:
            return None
        statistics = None
        if self.uses_batch_statistics:
            # Dynamo cannot trace the moments once sizes are symbolic, and of a single value, batch
            # norm refuses to take statistics, with an error of its own.
            single = x.numel() == x.shape[1] and not self._synchronizes
            if torch.compiler.is_compiling() or single:
                return None
            if gpu.is_usable(x) and all(p.dtype == torch.float32 for p in self.parameters()):
                return self._encode_on_gpu(x)
            statistics = self._batch_statistics(x)
            if statistics is None:
                return None
        kernel, bias = self.kernel_and_bias(x, statistics)
        return F.conv2d(x, kernel, bias, padding=1, groups=kernel.shape[0])

    @property
    def is_linear(self) -> bool:
        """Whether :meth:`kernel_and_bias` can be had: all branches are what they were built as,
        with batch norms of equal settings.
        """
        if self.deploy:
            return _is_depthwise(self.reparam)
        if not all(isinstance(each, nn.Sequential) and len(each) == 2 for each in self.branches):
            return False
        convs, norms = zip(*self.branches)
        return all(_is_depthwise(conv) and conv.bias is None for conv in convs) and all(
            isinstance(norm, _BatchNorm)
            and norm.affine
            and (norm.num_batches_tracked is not None) == norm.track_running_stats
            and _get_settings(norm) == _get_settings(norms[0])
            for norm in norms
        )

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the output for one map depends on the others."""
        return not self.deploy and _uses_batch(self.branches[0][1])

    @property
    def _synchronizes(self) -> bool:
        norm = self.branches[0][1]
        return isinstance(norm, nn.SyncBatchNorm) and not is_alone(norm.process_group)

    def _encode_on_gpu(self, x: Tensor) -> Tensor:
        convs, norms = zip(*self.branches)
        parameters = [conv.weight for conv in convs]
        parameters += [norm.weight for norm in norms] + [norm.bias for norm in norms]
        group = [norms[0].process_group] if self._synchronizes else []
        out, statistics = gpu.encode(x, self.skip, norms[0].eps, parameters, group)
        update_running_statistics(norms, *statistics)
        return out

    def kernel_and_bias(
        self, x: Tensor, statistics: Optional[Tuple[Tensor, Tensor]] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Kernel and bias that do the work of all branches on ``x``.

        Args:
            x: Feature map, (B, C, H, W).
            statistics: Mean and variance (branches, C) of the branches' outputs; None for the
                running ones.

        Returns:
            Kernel (C, 1, 3, 3) and bias (C,), differentiable.
        """
        if self.deploy:
            return self.reparam.weight, self.reparam.bias
        convs, norms = zip(*self.branches)
        with autocast_off(x):
            # shaped (branches, C, 9); the statistics, scales and biases (branches, C)
            kernels = full_precision(torch.stack([conv.weight.flatten(1) for conv in convs]))
            mean, var = statistics or (
                full_precision(torch.stack([getattr(norm, name) for norm in norms]))
                for name in ('running_mean', 'running_var')
            )
            scale = (var + norms[0].eps).rsqrt() * torch.stack([norm.weight for norm in norms])
            kernel = (scale.unsqueeze(-1) * kernels).sum(0)
            # Not by stack and sum: the gradients of the biases would be one piece of memory.
            bias = sum((norm.bias for norm in norms), start=-(scale * mean).sum(0))
            if self.skip:
                kernel = kernel + F.pad(kernel.new_ones(1), (4, 4))
            return kernel.view(-1, 1, 3, 3).to(x.dtype), bias.to(x.dtype)

    def _batch_statistics(self, x: Tensor) -> Optional[Tuple[Tensor, Tensor]]:
        """Mean and variance (branches, C) of the branches' outputs; running ones are updated.

        None if rounding errors would show in a variance.
        """
        convs, norms = zip(*self.branches)
        moments: Tuple[Tensor, Tensor, Any] = (*patch_moments(x), x.numel() // x.shape[1])
        if self._synchronizes:
            moments = synchronize_moments(*moments, norms[0].process_group)
        patch_mean, patch_covariance, count = moments
        with autocast_off(x):
            kernels = torch.stack([conv.weight.flatten(1) for conv in convs]).to(patch_mean)
            mean = (kernels * patch_mean).sum(-1)
            var = _quadratic_form(kernels, patch_covariance)
            # PyTorch's synchronized batch norm does not train on a CPU.
            if _has_values(x) and not isinstance(norms[0], nn.SyncBatchNorm):
                terms = _quadratic_form(kernels.detach().abs(), patch_covariance.detach().abs())
                if (var + norms[0].eps < 1e3 * torch.finfo(var.dtype).eps * terms).any():
                    return None
            var = var.clamp(min=0)
        update_running_statistics(norms, mean.detach(), var.detach() * (count / (count - 1)))
        return mean, var

    def switch_to_deploy(self) -> None:
        """Replace the branches by one convolution with the same output.

        The arithmetic is in float64. A second call does nothing.

        Raises:
            RuntimeError: In training mode, where batch norms use the batch's
                statistics and the branches are no fixed linear map.
            TypeError: If the convolution of a branch was exchanged, or its norm is no batch norm.
        """
        if self.deploy:
            return
        if self.training:
            raise RuntimeError(
                'switch_to_deploy() needs evaluation mode: call model.eval() first, '
                'since batch norms in training mode cannot be fused'
            )
        with torch.inference_mode(False), torch.no_grad():  # what it makes may get gradients later
            kernel, bias = self.fused_kernel_and_bias()
            channels, like = len(kernel), self.branches[0][0].weight
            reparam = nn.Conv2d(channels, channels, 3, padding=1, groups=channels).to(like)
            reparam.weight.copy_(kernel)
            reparam.bias.copy_(bias)
        self.reparam = reparam.eval().requires_grad_(like.requires_grad)
        del self.branches
        self.deploy = True

    def fused_kernel_and_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel (C, 1, 3, 3) and bias (C,), in float64, of the fused form.

        Raises:
            TypeError: If the convolution of a branch was exchanged, or its norm is no batch norm.
        """
        fused = [_fuse_conv_norm(*branch.children()) for branch in self.branches]
        kernel, bias = (torch.stack(tensors).sum(0) for tensors in zip(*fused))
        if self.skip:
            kernel[:, 0, 1, 1] += 1
        return kernel, bias

    def extra_repr(self) -> str:
        return f'skip={self.skip}, deploy={self.deploy}'


def _is_depthwise(conv: nn.Module) -> bool:
    """Whether it is a convolution as the encoding builds it."""
    if not isinstance(conv, nn.Conv2d):
        return False
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    expected = ((3, 3), (1, 1), (1, 1), (1, 1), 'zeros')
    return geometry == expected and conv.groups == conv.in_channels == conv.out_channels


def _quadratic_form(kernels: Tensor, matrix: Tensor) -> Tensor:
    """w^T S w of kernels (branches, C, 9) and (C, 9, 9), (branches, C)."""
    return ((kernels.transpose(0, 1) @ matrix).transpose(0, 1) * kernels).sum(-1)


def _has_values(x: Tensor) -> bool:
    """Whether a value can be asked for, without waiting for a GPU."""
    return x.device.type == 'cpu' and getattr(x, 'fake_mode', None) is None


def _uses_batch(norm: nn.Module) -> bool:
    return norm.training or norm.running_mean is None


def _get_settings(norm: _BatchNorm) -> tuple:
    """What the batch norms of all branches must have in common."""
    group = getattr(norm, 'process_group', None)
    mode = norm.training, norm.track_running_stats, _uses_batch(norm)
    return type(norm), group, norm.eps, norm.momentum, *mode


@torch.no_grad()
def update_running_statistics(norms: tuple, mean: Tensor, var: Tensor) -> None:
    """As batch norms do, with means and unbiased variances (branches, C) of the batch."""
    if not norms[0].training or not norms[0].track_running_stats:
        return
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    batch = [*mean.to(running[0]), *var.to(running[0])]
    counts = [norm.num_batches_tracked for norm in norms]
    torch._foreach_add_(counts, 1)
    if norms[0].momentum is None:  # cumulative average
        torch._foreach_lerp_(running, batch, [1 / n.to(running[0]) for n in counts] * 2)
    else:
        torch._foreach_lerp_(running, batch, norms[0].momentum)


def _fuse_conv_norm(conv: nn.Module, norm: Optional[nn.Module] = None) -> Tuple[Tensor, Tensor]:
    """Kernel and bias, in float64, of a convolution followed by its batch norm."""
    if not isinstance(conv, nn.Conv2d) or not _is_depthwise(conv):
        raise TypeError(f'only depth-wise 3x3 convolutions can be fused, got {conv}')
    if norm is None:  # as one that changes nothing
        norm = nn.BatchNorm2d(len(conv.weight), eps=0, affine=False, device=conv.weight.device)
    for layer in (conv, norm):
        if layer._forward_hooks or layer._forward_pre_hooks or 'forward' in layer.__dict__:
            raise TypeError(
                f'a hook or another forward is attached to {layer}, and the fused convolution would '
                'be without it: remove it first (of pruning, with torch.nn.utils.prune.remove)'
            )
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        raise TypeError(
            f'only batch norms with running statistics can be fused into a convolution, '
            f'got {norm}: keep the training form, or train with norm_cfg=dict(type="BN")'
        )
    tensors = conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
    exact: Any = [None if tensor is None else tensor.double() for tensor in tensors]
    kernel, bias, mean, var, scale, shift = exact
    return fuse_conv_bn_weights(kernel, bias, mean, var, norm.eps, scale, shift)
