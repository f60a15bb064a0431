# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The command ``mmlinglo``, also ``python -m mmlinglo``: the tools of a checkout, from anywhere.

For several GPUs: ``torchrun --nproc_per_node 8 -m mmlinglo train CONFIG --launcher pytorch``.
"""

import argparse
import difflib
import runpy
import sys
from typing import List, Optional

import mmlinglo

TOOLS = {  # by command: the script under tools/, and what it does
    'train': ('train.py', 'train a classifier, detector or segmentor'),
    'test': ('test.py', 'evaluate a checkpoint'),
    'infer': ('infer.py', 'predict on an image, a folder or a video'),
    'check-data': ('misc/check_dataset.py', 'look for mistakes in a data set and its config'),
    'download': ('misc/download_dataset.py', 'download COCO or ADE20K'),
    'deploy': (
        'model_converters/reparameterize_model.py',
        'write a checkpoint in the deployed form',
    ),
    'export': ('deployment/export_onnx.py', 'export a model to ONNX'),
    'publish': ('model_converters/publish_model.py', 'shrink a checkpoint to its weights'),
    'report': ('analysis_tools/report.py', 'make a page of a training: curves, metrics, images'),
}
OTHERS = {
    'check-env': 'report what is installed, and how to repair what is wrong',
    'list': 'list the recipes, such as: mmlinglo list "retinanet*"',
}


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command.

    Args:
        argv: Arguments, without the program; those of this process by default.

    Returns:
        The exit status. Tools end the process themselves if something is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ('--help', [])
    if command in ('-h', '--help'):
        print(usage())
    elif command == '--version':
        print(mmlinglo.__version__)
    elif command == 'check-env':
        from mmlinglo import check_env

        sys.argv = ['mmlinglo check-env', *rest]
        check_env.main()
    elif command == 'list':
        mmlinglo.require_openmmlab()
        from mmlinglo.utils.cli import run

        run(lambda: list_recipes(rest))
    elif command in TOOLS:
        mmlinglo.require_openmmlab()
        from mmlinglo.hub import find_root
        from mmlinglo.utils.cli import run

        sys.argv = [f'mmlinglo {command}', *rest]
        tool = runpy.run_path(str(find_root() / 'tools' / TOOLS[command][0]))
        run(tool['main'])
    else:
        similar = difflib.get_close_matches(command, [*TOOLS, *OTHERS], 1)
        hint = f', did you mean {similar[0]!r}?' if similar else ''
        print(f'error: mmlinglo has no command {command!r}{hint}\n\n{usage()}', file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    """What ``mmlinglo --help`` prints."""
    commands = {**{name: text for name, (_, text) in TOOLS.items()}, **OTHERS}
    lines = [f'  {name:<12}{text}' for name, text in commands.items()]
    end = 'mmlinglo COMMAND --help shows its options.'
    return '\n'.join(['usage: mmlinglo COMMAND ...', '', *lines, '', end])


def list_recipes(argv: List[str]) -> None:
    """Print the names of the recipes."""
    parser = argparse.ArgumentParser('mmlinglo list', description=OTHERS['list'])
    parser.add_argument('pattern', nargs='?', default='*', help='with * and ? as wildcards')
    print('\n'.join(mmlinglo.list_models(parser.parse_args(argv).pattern)))


if __name__ == '__main__':
    sys.exit(main())
