# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Draw docs/images/{network,block,rp_cpe}.svg from the modules of a LinGlo-b0.

The pictures are 360 pixels wide, so that a phone shows them in full size.
"""

import random
from pathlib import Path
from typing import List

import torch
from torch import Tensor, nn

from mmlinglo import LinGlo

IMAGES = Path(__file__).resolve().parent / 'images'
COLUMNS = (36, 108, 180, 252, 324)  # of the branches and of the skip
BLUE, YELLOW, GREY = '#cfe2f3', '#fff2cc', '#eeeeee'
DEFINITIONS = """<rect width="100%" height="100%" fill="white"/>
<marker id="head" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0L8 4L0 8z"/></marker>"""


def text(x: int, y: int, words: str, size: int = 14) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle">{words}</text>'


def box(x: int, y: int, width: int, words: str, fill: str = GREY, radius: int = 5) -> str:
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="30" rx="{radius}" fill="{fill}"'
    return f'{rect} stroke="#555"/>{text(x + width // 2, y + 20, words)}'


def arrow(*points: int) -> str:
    path = ' '.join(map(str, points))
    return f'<polyline points="{path}" fill="none" stroke="#333" marker-end="url(#head)"/>'


def picture(height: int, parts: List[str]) -> str:
    """An SVG of the parts on white."""
    size = f'width="360" height="{height}" viewBox="0 0 360 {height}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" {size}>'
    return '\n'.join([start, DEFINITIONS, *parts, '</svg>\n'])


def describe(layer: nn.Module) -> str:
    """A layer in a few words."""
    if isinstance(layer, nn.Conv2d):
        stride = f', stride {layer.stride[0]}' if layer.stride[0] > 1 else ''
        return 'Conv {} x {}'.format(*layer.kernel_size) + stride
    if isinstance(layer, nn.Linear):
        return f'Linear {layer.in_features} → {layer.out_features}'
    if hasattr(layer, 'branches'):
        return f'RP-CPE: {len(layer.branches)} branches' + ' and a skip' * layer.skip
    return type(layer).__name__


def draw_network(model: LinGlo) -> str:
    """The stages, with the shapes of their maps for an image of 224 x 224."""
    maps = model(torch.zeros(1, 3, 224, 224))
    parts, y = [text(125, 22, 'Image 3 x 224 x 224')], 30
    for i, (stage, out) in enumerate(zip(model.stages, maps)):
        down, shape = stage.downsample or model.patch_embed, ' x '.join(map(str, out.shape[1:]))
        blocks = f'Stage {i + 1}: {len(stage.blocks)} x {describe(stage.blocks[0])}'
        parts += [arrow(125, y, 125, y + 18), arrow(125, y + 50, 125, y + 68)]
        parts += [box(5, y + 20, 240, f'{describe(down.conv)}, {describe(down.norm)}', BLUE)]
        parts += [box(5, y + 70, 240, blocks, YELLOW), arrow(245, y + 85, 260, y + 85)]
        parts += [text(312, y + 80, describe(getattr(model, f'norm{i}'))), text(312, y + 99, shape)]
        y += 100
    return picture(y + 10, parts)


def draw_block(block: nn.Module) -> str:
    """The two residual branches of a block of the first stage."""
    ffn = [layer for layer in block.ffn.children() if not isinstance(layer, nn.Identity)]
    parts, y = [text(155, 22, describe(block))], 30
    for layers in ([block.norm1, block.attn], [block.norm2, *ffn]):
        start = y + 8
        for layer in layers:
            fill = GREY if type(layer).__module__.startswith('torch') else YELLOW
            parts += [arrow(155, y, 155, y + 18), box(25, y + 20, 260, describe(layer), fill)]
            y += 50
        parts += [
            arrow(155, y, 155, y + 59),
            arrow(155, start, 325, start, 325, y + 26, 155, y + 26),
        ]
        parts += [box(140, y + 11, 30, '+', radius=15)]
        y += 41
    return picture(y + 24, parts)


def draw_kernel(x: int, y: int, weight: Tensor) -> str:
    """A 3 x 3 kernel: blue is negative, white zero, red positive."""
    cells = []
    for k, value in enumerate(weight.flatten().tolist()):
        light = 255 - round(150 * min(abs(value), 1.0))
        fill = f'rgb({light},{light},255)' if value < 0 else f'rgb(255,{light},{light})'
        place = f'x="{x + k % 3 * 18}" y="{y + k // 3 * 18}" width="18" height="18"'
        cells.append(f'<rect {place} fill="{fill}" stroke="#777"/>')
    return ''.join(cells)


def draw_fusion(model: LinGlo) -> str:
    """The kernels of one channel before, in and after ``switch_to_deploy``."""
    encoding, draws = model.stages[0].blocks[0].ffn.pos_encoding, random.Random(1)
    parts, kernels = [text(180, 20, 'Training: 4 branches and a skip')], []
    for x, branch in zip(COLUMNS, encoding.branches):
        conv, norm = branch.children()
        conv.weight.data[0] = torch.tensor([draws.gauss(0, 0.3) for _ in range(9)]).view(1, 3, 3)
        norm.running_var[0] = draws.uniform(0.3, 1.5)
        kernels.append(conv.weight[0, 0] * norm.weight[0] / (norm.running_var[0] + norm.eps).sqrt())
        parts += [arrow(180, 26, 180, 44, x, 44, x, 66), draw_kernel(x - 27, 68, conv.weight[0])]
        parts += [arrow(x, 122, x, 191, 180, 191), box(x - 27, 135, 54, 'BN')]
    parts += [arrow(180, 44, 324, 44, 324, 191, 180, 191), box(165, 176, 30, '+', radius=15)]
    parts += [text(180, 240, 'Each norm goes into its kernel. The skip is a 1.')]
    kernels.append(nn.init.dirac_(torch.zeros(1, 1, 3, 3))[0, 0])
    for x, kernel in zip(COLUMNS, kernels):
        parts += [text(x - 36, 287, '+' * (x > 36), 18), draw_kernel(x - 27, 254, kernel)]
    model.switch_to_deploy()
    fused = next(m for m in encoding.modules() if isinstance(m, nn.Conv2d)).weight[0, 0]
    torch.testing.assert_close(fused, sum(kernels))
    parts += [text(135, 361, '=', 18), draw_kernel(153, 328, fused)]
    return picture(420, [*parts, text(180, 406, 'Deployed: one convolution with a bias')])


@torch.no_grad()
def main() -> None:
    model = LinGlo('b0').eval()
    (IMAGES / 'network.svg').write_text(draw_network(model))
    (IMAGES / 'block.svg').write_text(draw_block(model.stages[0].blocks[0]))
    (IMAGES / 'rp_cpe.svg').write_text(draw_fusion(model))


if __name__ == '__main__':
    main()
