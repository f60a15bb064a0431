# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import check_integer
from .patch_moments import patch_moments
from .precision import autocast_off
from .synchronize import synchronize_statistics

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)  # the last is type='SyncBN'
_IDENTITY = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])


class ConditionalPositionalEncoding(nn.Module):
    r"""Conditional positional encoding by depth-wise convolution (paper Sec. 3.2, Fig. 2).

    ``x`` (if ``skip``) plus ``num_branches`` parallel branches, each a 3x3
    depth-wise convolution followed by ``norm_cfg``. The four rows of the paper's
    Table 6 are::

        CPE     num_branches=1, skip=False
        R-CPE   num_branches=1, skip=True
        P-CPE   num_branches=4, skip=False
        RP-CPE  num_branches=4, skip=True     (the default)

    With batch norms it is computed as one convolution, also in training. Branch
    i with kernel w_i is normalized by the mean m and covariance S of the 3x3
    patches of x alone (:func:`patch_moments`), whatever its own output is::

        mean_i = w_i . m,  var_i = w_i^T S w_i,  a_i = weight_i / sqrt(var_i + eps)
        out = x * (identity + sum_i a_i w_i) + sum_i (bias_i - a_i mean_i)

    so that no branch's output is computed or kept for the backward pass. With
    running statistics nothing is left to compute but the kernel, and
    :meth:`switch_to_deploy` fixes that for good (RepVGG, Diverse Branch Block).
    Outputs, gradients and running statistics agree with those of the branches to
    rounding; synchronized batch norms exchange the branches' statistics.

    Args:
        channels: Channels C of the input and the output.
        num_branches: Parallel convolution branches, at least 1.
        skip: Whether the input is added to the branches.
        norm_cfg: Norm of each branch; None for convolutions with a bias and no
            norm. Only batch norms and None can be fused.
        deploy: Whether to build the fused form, one convolution named
            :attr:`reparam`. ``num_branches``, ``skip`` and ``norm_cfg`` are
            then without effect.

    Raises:
        ValueError: If ``channels`` or ``num_branches`` is below 1.
        TypeError: If one is no integer.

    Example:
        >>> rp_cpe = ConditionalPositionalEncoding(256)
        >>> rp_cpe(torch.rand(1, 256, 56, 56)).shape
        torch.Size([1, 256, 56, 56])
    """

    kernel_size = 3

    def __init__(
        self,
        channels: int,
        num_branches: int = 4,
        skip: bool = True,
        norm_cfg: Optional[dict] = dict(type='BN'),  # noqa: B006
        deploy: bool = False,
    ) -> None:
        super().__init__()
        check_integer('channels', channels, 1)
        check_integer('num_branches', num_branches, 1)
        self.channels = channels
        self.num_branches = num_branches
        self.skip = skip
        self.deploy = deploy
        if deploy:
            self.reparam = self._depthwise_conv()
        else:
            self.branches = nn.ModuleList(
                ConvModule(
                    channels,
                    channels,
                    self.kernel_size,
                    padding=self.kernel_size // 2,
                    groups=channels,
                    norm_cfg=norm_cfg,
                    act_cfg=None,
                )
                for _ in range(num_branches)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add the encoding.

        Args:
            x: Feature map, (B, C, H, W).

        Returns:
            Feature map, (B, C, H, W).
        """
        if self.deploy:
            return self.reparam(x)
        # Of a single value, batch norm refuses to take statistics, with an error of its own.
        if not self.is_linear or (self.uses_batch_statistics and x.numel() == self.channels):
            return self._forward_branches(x)
        return depthwise_conv(x, *self.kernel_and_bias(x))

    def _forward_branches(self, x: Tensor) -> Tensor:
        out = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return x + out if self.skip else out

    @property
    def is_linear(self) -> bool:
        """Whether :meth:`kernel_and_bias` can be had: from batch norms which all take the same statistics.

        Not where hooks are to see the branches, or change them.
        """
        if self.deploy:
            return True
        if has_hooks(self.branches):
            return False
        norms = [branch.norm for branch in self.branches if branch.with_norm]
        if len(norms) < len(self.branches) or type(norms[0]) not in BATCH_NORMS:
            return False
        if any(branch.conv.bias is not None for branch in self.branches):
            return False
        return len({_uses_batch(norm) for norm in norms}) == 1

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether :meth:`kernel_and_bias` depends on the values of ``x``."""
        return not self.deploy and _uses_batch(self.branches[0].norm)

    def kernel_and_bias(
        self, x: Tensor, moments: Optional[Tuple[Tensor, Tensor]] = None
    ) -> Tuple[Tensor, Tensor]:
        """Kernel and bias that do the work of all branches on ``x``; running statistics are updated.

        Args:
            x: Feature map, (B, C, H, W).
            moments: What :func:`patch_moments` says of ``x``, for batch
                statistics; None to compute it.

        Returns:
            Kernel (C, 1, 3, 3) and bias (C,), differentiable.
        """
        if self.deploy:
            return self.reparam.weight, self.reparam.bias
        norms = [branch.norm for branch in self.branches]
        with autocast_off(x):
            # shaped (branches, C, 9); the statistics, scales and biases (branches, C)
            kernels = torch.stack([branch.conv.weight.flatten(1) for branch in self.branches])
            if _uses_batch(norms[0]):
                mean, var = self._batch_statistics(x, kernels, moments)
            else:
                mean = torch.stack([norm.running_mean for norm in norms])
                var = torch.stack([norm.running_var for norm in norms])
            eps = var.new_tensor([norm.eps for norm in norms]).unsqueeze(1)
            scale = (var + eps).rsqrt()
            if norms[0].affine:
                scale = scale * torch.stack([norm.weight for norm in norms])
            kernel = (scale.unsqueeze(-1) * kernels).sum(0)
            bias = -(scale * mean).sum(0)
            if norms[0].affine:
                # Not by stack and sum: the four gradients would be one piece of memory.
                for norm in norms:
                    bias = bias + norm.bias
            if self.skip:
                kernel = kernel + _IDENTITY.to(kernel)
            kernel = kernel.view(-1, 1, self.kernel_size, self.kernel_size)
            return kernel.to(x.dtype), bias.to(x.dtype)

    def _batch_statistics(
        self, x: Tensor, kernels: Tensor, moments: Optional[Tuple[Tensor, Tensor]]
    ) -> Tuple[Tensor, Tensor]:
        """Mean and variance (branches, C) of the branches' outputs; running ones are updated."""
        norms = [branch.norm for branch in self.branches]
        patch_mean, patch_covariance = moments or patch_moments(x)
        kernels = kernels.to(patch_mean)
        mean = (kernels * patch_mean).sum(-1)
        var = ((kernels.transpose(0, 1) @ patch_covariance).transpose(0, 1) * kernels).sum(-1)
        count = x.numel() // self.channels
        if isinstance(norms[0], nn.SyncBatchNorm):
            mean, var, count = synchronize_statistics(mean, var, count, norms[0].process_group)
        var = var.clamp(min=0)
        for norm, batch_mean, batch_var in zip(norms, mean.detach(), var.detach()):
            _update_running_statistics(norm, batch_mean, batch_var, count)
        return mean, var

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Replace the branches by one convolution with the same output.

        The arithmetic is in float64. A second call does nothing.

        Raises:
            RuntimeError: In training mode, where batch norms use the batch's
                statistics and the branches are no fixed linear map.
            TypeError: If the norm of a branch is no batch norm.
        """
        if self.deploy:
            return
        if self.training:
            raise RuntimeError(
                'switch_to_deploy() needs evaluation mode: call model.eval() first, '
                'since batch norms in training mode cannot be fused'
            )
        kernel, bias = self.fused_kernel_and_bias()
        reference = self.branches[0].conv.weight
        reparam = self._depthwise_conv().to(reference)
        reparam.weight.copy_(kernel)
        reparam.bias.copy_(bias)
        self.reparam = reparam.train(self.training)
        del self.branches
        self.deploy = True

    def fused_kernel_and_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel (C, 1, 3, 3) and bias (C,), in float64, of the fused form.

        Raises:
            TypeError: If the norm of a branch is no batch norm.
        """
        fused = [_fuse_conv_norm(branch) for branch in self.branches]
        kernel = sum(kernel for kernel, _ in fused)
        bias = sum(bias for _, bias in fused)
        if self.skip:
            centre = self.kernel_size // 2
            kernel[:, 0, centre, centre] += 1
        return kernel, bias

    def extra_repr(self) -> str:
        return (
            f'channels={self.channels}, num_branches={self.num_branches}, '
            f'skip={self.skip}, deploy={self.deploy}'
        )

    def _depthwise_conv(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.channels,
            self.channels,
            self.kernel_size,
            padding=self.kernel_size // 2,
            groups=self.channels,
        )


def depthwise_conv(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Depth-wise convolution of (B, C, H, W) by kernels (C, 1, 3, 3), same size out."""
    return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2, groups=len(kernel))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module, or of one in it, does or shows more than its forward: hooks, pruning."""
    return any(
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
        for child in module.modules()
    )


def _uses_batch(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _update_running_statistics(
    norm: _BatchNorm, mean: Tensor, var: Tensor, count: Union[int, Tensor]
) -> None:
    """As batch norm does, with the unbiased variance and its kinds of averages."""
    if not norm.training or not norm.track_running_stats:
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # cumulative average
        momentum = 1 / norm.num_batches_tracked.to(norm.running_mean)
    unbiased = var * (count / (count - 1))
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_((batch.to(running) - running) * momentum)


class AbsolutePositionEmbedding(nn.Module):
    """Learned position embedding of one stage, as in PVT (paper Sec. 5.4: LinGlo-w/o-C, w/o-CH).

    Args:
        embed_dims: Channels C.
        size: Height and width, in positions, of the learned grid. Maps of
            other sizes get it resized (bilinear, as in PVT).
    """

    def __init__(self, embed_dims: int, size: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, embed_dims, size, size))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Add the embedding to a map, (B, H, W, C) to (B, H, W, C)."""
        pos_embed, size = self.pos_embed, x.shape[1:3]
        if pos_embed.shape[2:] != size:
            pos_embed = F.interpolate(pos_embed, size, mode='bilinear', align_corners=False)
        return x + pos_embed.permute(0, 2, 3, 1)


def _fuse_conv_norm(branch: ConvModule) -> Tuple[Tensor, Tensor]:
    """Kernel and bias, in float64, of a convolution followed by its batch norm."""
    conv = branch.conv
    kernel = conv.weight.double()
    bias = kernel.new_zeros(len(kernel)) if conv.bias is None else conv.bias.double()
    if not branch.with_norm:
        return kernel, bias
    norm = branch.norm
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        raise TypeError(
            f'only batch norms with running statistics can be fused into a convolution, '
            f'got {norm}: keep the training form, or train with norm_cfg=dict(type="BN")'
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale = scale * norm.weight.double()
        shift = shift * norm.weight.double() + norm.bias.double()
    return kernel * scale.view(-1, 1, 1, 1), bias * scale + shift
