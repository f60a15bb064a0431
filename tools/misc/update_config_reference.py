# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Bring docs/config_reference.md up to date with signatures and docstrings.

It lists whatever is registered in mmlinglo.registry, and the layers that LinGlo is made of.
"""

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union, get_args, get_origin

from mmengine.registry import Registry

import mmlinglo.engine  # noqa: F401, registers hooks
from mmlinglo import registry
from mmlinglo.models import LinGlo, data_preprocessors, layers
from mmlinglo.utils.cli import UsageError, run
from mmlinglo.utils.files import complete_file

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / 'docs/config_reference.md'
HEADER = """\
<!-- Written by tools/misc/update_config_reference.py from the docstrings; changes belong there. -->
# Config reference

Every class and function of mmlinglo that a config can name, with its arguments. Whatever is not listed is mmengine's or the
toolboxes'. A config says `type='mmlinglo.NAME'`; the backbone also answers to `type='LinGlo'` once mmlinglo is imported.
"""
LAYERS = """
The layers of the backbone, for networks of one's own: `from mmlinglo.models import layers`. Configs do not name them.
"""
LAYER_CLASSES = (
    layers.KeyOnlyAttention,
    layers.DotProductAttention,
    layers.ConditionalPositionalEncoding,
    layers.AbsolutePositionEmbedding,
    layers.FFN,
    layers.HybridBlock,
    layers.ConvBlock,
    layers.PatchEmbed,
)
TITLES = {
    'MODELS': 'Data preprocessors',
    'HOOKS': 'Hooks',
    'OPTIM_WRAPPER_CONSTRUCTORS': 'Optimizer wrapper constructors',
}
SECTIONS = ('Args', 'Raises', 'Returns', 'Example', 'Note')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--check', action='store_true', help='write nothing; fail if the file would change'
    )
    return parser.parse_args()


def reference() -> str:
    """The page."""
    parts = [HEADER, '## Backbone\n', entry('LinGlo', LinGlo), sizes()]
    for key, each in vars(registry).items():
        if isinstance(each, Registry) and each.scope == 'mmlinglo':
            parts.append(f'## {TITLES.get(key, each.name.capitalize() + "s")}\n')
            if key == 'MODELS':
                parts.append(markdown(inspect.getdoc(data_preprocessors)) + '\n')
            items = sorted((name, item) for name, item in each.module_dict.items())
            parts += [entry(name, item) for name, item in items if item is not LinGlo]
    parts += ['## Layers', LAYERS, *(entry(item.__name__, item) for item in LAYER_CLASSES)]
    return '\n'.join(parts)


def sizes() -> str:
    """Table of the named sizes."""
    lines = [
        '| `arch` | `embed_dims` | `depths` | `num_heads` | `mlp_ratio` |',
        '|---|---|---|---|---|',
    ]
    for name, arch in LinGlo.arch_zoo.items():
        values = (', '.join(map(str, value)) for value in arch.values())
        lines.append(f'| `{name!r}` | {" | ".join(values)} |')
    return '\n'.join([*lines, ''])


def entry(name: str, item: Callable) -> str:
    """Heading, text and table of the arguments of a class or function."""
    sections = split(inspect.getdoc(item) or '')
    described = dict(arguments(sections.get('Args', '')))
    rows = []
    inherits = inspect.isclass(item) and '__init__' not in vars(item)  # the text says from what
    for parameter in () if inherits else inspect.signature(item).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        text = described.pop(parameter.name, None)
        if text is None:
            raise UsageError(f'the docstring of {name} does not describe {parameter.name!r}')
        default = '' if parameter.default is parameter.empty else f'`{parameter.default!r}`'
        kind = type_name(parameter.annotation)
        rows.append(f'| `{parameter.name}` | {kind} | {default} | {markdown(text)} |')
    if described:
        raise UsageError(f'the docstring of {name} describes {sorted(described)}, no arguments')
    parts = [f'### {name}\n', markdown(sections['']) + '\n']
    if rows:
        parts.append('\n'.join(['| Argument | Type | Default | |', '|---|---|---|---|', *rows, '']))
    if 'Raises' in sections:
        parts.append('Raises ' + '; '.join(raised(sections['Raises'])) + '.\n')
    return '\n'.join(parts)


def split(doc: str) -> Dict[str, str]:
    """Sections of a Google docstring by title; '' is the text before them."""
    sections, title = {'': ''}, ''
    for line in doc.splitlines():
        found = re.fullmatch(r'(\w+):', line)
        if found and found[1] in SECTIONS:
            title = found[1]
            sections[title] = ''
        else:
            sections[title] += f'{line}\n'
    return sections


def arguments(section: str) -> Iterator[Tuple[str, str]]:
    """Names and texts of a section like "Args"."""
    for item in re.split(r'\n(?=    \S)', '\n' + section.rstrip()):
        if item.strip():
            name, _, text = item.strip().partition(':')
            yield name, ' '.join(text.split())


def raised(section: str) -> Iterator[str]:
    for name, text in arguments(section):
        yield f'`{name}` {markdown(text[0].lower() + text[1:]).rstrip(".")}'


def markdown(text: str) -> str:
    """reStructuredText as our docstrings use it, as Markdown."""
    text = re.sub(r':\w+:`~?([^`]+)`', lambda found: f'`{short(found[1])}`', text)
    text = re.sub(r'(?s)`([^`<]+?)\s*<([^>`]+)>`_+', r'[\1](\2)', text)
    text = text.replace('``', '`').strip()
    return '\n'.join(literal_blocks(text.splitlines()))


def short(name: str) -> str:
    """`forward` for a method, the last part of a longer path."""
    return name.rsplit('.', 1)[-1]


def literal_blocks(lines: List[str]) -> Iterator[str]:
    """What is indented after a line that ends in `::`, fenced."""
    inside = opened = False
    held: List[str] = []
    for line in lines:
        if inside and not line.strip():
            held.append(line)
        elif inside and line.startswith('    '):
            if not opened:
                yield from ('', '```text')
                held, opened = [], True
            yield from (*held, line[4:])
            held = []
        else:
            if opened:
                yield '```'
            yield from held
            held, opened = [], False
            inside = line.endswith('::')
            yield line[:-1] if inside else line
    if opened:
        yield '```'


def type_name(annotation: Any) -> str:
    """Union[str, dict, None] as "str, dict or None"."""
    if get_origin(annotation) is Union:
        names = [type_name(each) for each in get_args(annotation)]
        names.sort(key=lambda name: name == 'None')
        return ' or '.join([', '.join(names[:-1]), names[-1]])
    if annotation is type(None):
        return 'None'
    if get_origin(annotation) is not None:
        inner = ', '.join(type_name(each) for each in get_args(annotation) if each is not Ellipsis)
        return f'{get_origin(annotation).__name__.lower()} of {inner}'
    return getattr(annotation, '__name__', str(annotation))


def written() -> Optional[str]:
    return DOC.read_text() if DOC.is_file() else None


def main() -> None:
    args = parse_args()
    text = reference()
    changed = text != written()
    name = DOC.relative_to(ROOT).as_posix()
    if args.check and changed:
        raise UsageError(f'not up to date: {name}. Run python {Path(sys.argv[0]).as_posix()}')
    if changed:
        with complete_file(DOC) as file:
            file.write_text(text)
    print(f'written: {name}' if changed else f'{name} is up to date')


if __name__ == '__main__':
    run(main)
