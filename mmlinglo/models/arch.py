# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Sizes of the network (Sec. 3.4)."""

from dataclasses import asdict, dataclass
from math import inf
from typing import Dict, Mapping, Sequence, Tuple, Union

from .arguments import check_integer, get_length, is_number


@dataclass(frozen=True)
class Arch:
    """Widths, depths, heads, expansion ratios of the FFNs and strides, one entry for each stage.

    The default strides are 4, then 2 each; a later stage of stride 1 has no down-sampling layer.

    Raises:
        ValueError: If a value is out of range, or the sequences do not fit together.
        TypeError: If a number is of another type.
    """

    embed_dims: Tuple[int, ...]
    depths: Tuple[int, ...]
    num_heads: Tuple[int, ...]
    mlp_ratio: Tuple[float, ...]
    strides: Tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.strides:
            object.__setattr__(self, 'strides', (4,) + (2,) * (len(self.depths) - 1))
        for key, lowest in dict(embed_dims=1, depths=0, num_heads=1, strides=1).items():
            for value in self[key]:
                check_integer(f"each of arch['{key}']", value, lowest)
        for dims, heads, ratio in zip(self.embed_dims, self.num_heads, self.mlp_ratio):
            if dims % heads:
                raise ValueError(f'num_heads={heads} must divide embed_dims={dims} of its stage')
            if not is_number(ratio) or not 1 <= dims * ratio < inf:
                raise ValueError(
                    f"each of arch['mlp_ratio'] must be a number by which embed_dims={dims} "
                    f'gives at least one channel, got {ratio!r}'
                )
        for i in range(1, len(self.strides)):
            if self.strides[i] == 1 and self.embed_dims[i] != self.embed_dims[i - 1]:
                raise ValueError(
                    f'a stage of stride 1 keeps the channels, got arch strides {self.strides} with '
                    f'embed_dims {self.embed_dims}'
                )

    def __getitem__(self, key: str) -> tuple:
        """An entry by its name, as in the dict of a config."""
        return self.to_dict()[key]

    def to_dict(self) -> Dict[str, tuple]:
        """The dict for a config."""
        return asdict(self)

    @classmethod
    def parse(cls, arch: Union[str, Mapping[str, Sequence], 'Arch']) -> 'Arch':
        """Make one of a name or of a dict; ``strides`` may be left out.

        Raises:
            ValueError: If there is no such name, or the dict has other keys or unequal lengths.
            TypeError: If it is neither.
        """
        if isinstance(arch, cls):
            return arch
        if isinstance(arch, str):
            if arch not in ARCHS:
                raise ValueError(f'arch must be one of {list(ARCHS)} or a dict, got {arch!r}')
            return ARCHS[arch]
        if not isinstance(arch, Mapping):
            raise TypeError(f'arch must be one of {list(ARCHS)} or a dict, got {arch!r}')
        keys = {'embed_dims', 'depths', 'num_heads', 'mlp_ratio'}
        lengths = {get_length(values) for values in arch.values()}
        if set(arch) - {'strides'} != keys or len(lengths) != 1 or not all(lengths):
            raise ValueError(
                f'arch must be a dict of equally long sequences with the keys {sorted(keys)} and '
                f'optionally strides, got {dict(arch)}'
            )
        return cls(**{key: tuple(values) for key, values in arch.items()})


# b0, b1 and b2 are the paper's (Sec. 3.4). The larger ones have the widths and depths of
# PVTv2-B3, B4 and B5.
_B0 = ((32, 64, 160, 256), (2, 3, 3, 2), (1, 2, 5, 8), (8, 8, 4, 4))
_WIDE, _HEADS, _RATIO = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4)
ARCHS: Dict[str, Arch] = {
    'b0': Arch(*_B0),
    'b1': Arch(_WIDE, (2, 3, 3, 2), _HEADS, _RATIO),
    'b2': Arch(_WIDE, (3, 5, 9, 3), _HEADS, _RATIO),
    'b3': Arch(_WIDE, (3, 4, 18, 3), _HEADS, _RATIO),
    'b4': Arch(_WIDE, (3, 8, 27, 3), _HEADS, _RATIO),
    'b5': Arch(_WIDE, (3, 6, 40, 3), _HEADS, (4, 4, 4, 4)),
}
