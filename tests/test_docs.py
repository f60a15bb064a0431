# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The Markdown pages: the commands on them run, what they name exists, and the site builds without a warning.

Sphinx checks links, anchors and docstrings. A comment above each block of bash or Python, invisible on
the page, says what happens to the block here:

<!-- runs -->                           run, in the order of the page, in a copy of the checkout. `make_shapes.py` makes
                                        fewer and smaller scenes than it does for the reader, unless the command says
                                        how many
<!-- continues -->                      the same, in one program with the Python block above
<!-- runs after: PAGE -->               the same, once PAGE has been run
<!-- merged into: CONFIG -->            a piece of a config: CONFIG (or mmdet::..., mmpretrain::...) with it is built
<!-- tested by: tests/FILE.py::TEST --> that test runs it
<!-- needs: REASON, ... -->             not run; REASONS below
"""

import ast
import contextlib
import importlib.util
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

import mmengine
import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, Registry, init_default_scope
from preloaded_python import preloaded_python

import mmlinglo
import mmlinglo.analysis
import mmlinglo.dataset_checks
import mmlinglo.engine
import mmlinglo.utils.deploy
from mmlinglo import registry
from mmlinglo.utils.deploy import build_model

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ('*.md', 'configs/*/*.md', 'docs/**/*.md', '.github/**/*.md')
    for path in ROOT.glob(pattern)
)
REASONS = (
    *('GPUs', 'ImageNet', 'COCO', 'ADE20K', 'your data', 'weights'),
    *('a network', 'a cluster', 'hours'),
)
RUNNABLE = ('bash', 'python')
NOT_RUNNABLE = ('text', 'json')
# For the tests only; options of the command itself come later and win.
SMALLER = dict(make_shapes='--num-train 32 --num-val 8 --num-demo 4 --size 64')
PASSES_ON_TO = {
    'tools/dist_train.sh': 'tools/train.py',
    'tools/slurm_train.sh': 'tools/train.py',
    'tools/dist_test.sh': 'tools/test.py',
    'tools/slurm_test.sh': 'tools/test.py',
    'tools/gpu_day.sh': 'tools/analysis_tools/run_gpu_day.py',
}
NOT_WITH_THE_ORIGINALS = {  # pages with a block that fails there, and why
    'docs/deployment.md': 'torch.export.Dim.DYNAMIC needs torch 2.6',
    'docs/visualization.md': "mmsegmentation 1.2.2's browse_dataset fails with its OpenCV",
}
# Options of other programs that the text explains.
FOREIGN_OPTIONS = {
    '--mode',
    '--style',
    '--no-build-isolation',
    '--no-cache-dir',
    '--no-deps',
    '--tta',
}


class Block(NamedTuple):
    language: str
    mark: str
    code: str
    line: int  # of the fence, from 1


def blocks_of(text: str) -> List[Block]:
    """All fenced blocks with the comment in the line above each, or ''."""
    blocks, lines = [], text.splitlines()
    start = None
    for i, line in enumerate(lines):
        if start is None and line.startswith('```'):
            start = i
        elif start is not None and line.rstrip() == '```':
            above = lines[start - 1] if start else ''
            mark = re.fullmatch(r'<!-- (.*) -->', above)
            code = ''.join(f'{text}\n' for text in lines[start + 1 : i])
            blocks.append(Block(lines[start][3:].strip(), mark[1] if mark else '', code, start + 1))
            start = None
    assert start is None, f'the block in line {start + 1} does not end'
    return blocks


def without_blocks(text: str) -> str:
    return re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)


@cache
def names_of_tests(file: str) -> Set[str]:
    """Names of the tests in a file under tests/."""
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module(body=[])
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith('test_')
    }


def problem_of_mark(block: Block, page: str) -> str:
    """What is wrong with a block's mark, or ''."""
    if block.language in NOT_RUNNABLE:
        return f'{block.language} is never run, it needs no mark' if block.mark else ''
    if block.language not in RUNNABLE:
        return f'language {block.language!r} is none of {RUNNABLE + NOT_RUNNABLE}'
    kind, _, value = block.mark.partition(': ')
    if block.mark in ('runs', 'continues'):
        return ''
    if kind == 'runs after':
        return '' if beside(page, value).is_file() else f'no page {value!r}'
    if kind == 'merged into':
        exists = '::' in value or (ROOT / value).is_file()
        return '' if exists and block.language == 'python' else f'no config {value!r}'
    if kind == 'tested by':
        file, _, name = value.partition('::')
        return '' if name in names_of_tests(file) else f'no test {value!r}'
    if kind == 'needs':
        unknown = set(value.split(', ')) - set(REASONS)
        return f'no such reasons: {sorted(unknown)}' if unknown else ''
    return f'the block has no mark that says whether it is run, but {block.mark!r}'


def beside(page: str, target: str) -> Path:
    return (ROOT / page).parent / target


def problems_of_paths(text: str, page: str) -> Iterator[str]:
    """Files and folders of ours that the page names, links aside."""
    pattern = (
        r'(?<![\w./-])((?:configs|tools|tests|docs|requirements|mmlinglo)/[\w./-]*\w)([*{<$\[]?)'
    )
    code = ''.join(block.code for block in blocks_of(text))
    made = re.findall(r'(?:> |mkdir -p |cp \S+ )(\S+)', code)  # by the reader
    for path, unfinished in re.findall(pattern, text):
        if unfinished or any(f'{path}/'.startswith(f'{each}/') for each in made):
            continue
        if path.startswith('mmlinglo/.mim'):
            continue  # in wheels only
        if not (ROOT / path).exists() and not beside(page, path).exists():
            yield f'no file {path!r}'


def commands_of(text: str) -> Iterator[Tuple[str, List[str]]]:
    """Scripts under tools/ with the options that blocks and inline code give them."""
    blocks = ''.join(block.code for block in blocks_of(text) if block.language in ('bash', 'text'))
    lines = re.sub(r'\\?\n +|\\\n', ' ', blocks).splitlines()
    lines += [span.replace('\n', ' ') for span in re.findall(r'`([^`]+)`', without_blocks(text))]
    for line in lines:
        for part in re.split(r' && | \| |; ', line.partition(' #')[0]):
            found = re.search(r'(?:^|[ /])(tools/[\w/.-]+\.(?:py|sh))(.*)', part)
            if found and (ROOT / found[1]).is_file():
                yield found[1], re.findall(r'(?<![\w-])--[a-z][\w-]*', found[2])


@cache
def options_of(tool: str) -> Set[str]:
    """Options in a tool's --help; of a shell script, those of what it passes them on to."""
    tool = PASSES_ON_TO.get(tool, tool)
    if tool.endswith('.sh'):
        comment = (ROOT / tool).read_text().partition('\nset ')[0]
        return set(re.findall(r'--[a-z][\w-]*', comment))
    spec = importlib.util.spec_from_file_location(f'tool_{Path(tool).stem}', ROOT / tool)
    module = importlib.util.module_from_spec(spec)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, 'argv', [tool, '--help'])
        patch.setattr(sys, 'path', [str((ROOT / tool).parent), *sys.path])
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit):
            module.main(['--help'])
    return set(re.findall(r'--[a-z][\w-]*', printed.getvalue()))


@cache
def options_of_all_tools() -> Set[str]:
    tools = (str(path.relative_to(ROOT)) for path in (ROOT / 'tools').rglob('*.py'))
    return set().union(*map(options_of, tools))


def problems_of_options(text: str) -> Iterator[str]:
    for tool, options in commands_of(text):
        if tool == 'tools/run_tests.sh':  # pytest's
            continue
        for option in options:
            if option not in options_of(tool):
                yield f'{tool} has no option {option}'
    for option in re.findall(r'`(--[a-z][\w-]*)', without_blocks(text)):
        if option not in options_of_all_tools() | FOREIGN_OPTIONS:
            yield f'no tool has the option {option}'


def problems_of_names(text: str) -> Iterator[str]:
    """Names in `mmlinglo`, and arguments of the backbone in --cfg-options."""
    registries = [value for value in vars(registry).values() if isinstance(value, Registry)]
    for name in re.findall(r'(?<![\w/.-])mmlinglo((?:\.[A-Za-z_]\w*)+)', text):
        if name.rpartition('.')[2].isupper():  # a placeholder
            continue
        value = mmlinglo
        for part in name[1:].split('.'):
            value = getattr(value, part, None)
        registered = any(name[1:] in each.module_dict for each in registries)
        if value is None and not registered and not module_exists(f'mmlinglo{name}'):
            yield f'there is no mmlinglo{name}'
    arguments = inspect.signature(mmlinglo.LinGlo).parameters
    for name in re.findall(r'model\.backbone\.(\w+)[=.]', text):
        if name not in arguments:
            yield f'LinGlo has no argument {name!r}'


def module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def problems_of(text: str, page: str) -> List[str]:
    """All that is wrong with a page, nothing of it being run."""
    problems = [
        f'line {block.line}: {problem}'
        for block in blocks_of(text)
        if (problem := problem_of_mark(block, page))
    ]
    problems += problems_of_paths(text, page)
    problems += problems_of_options(text)
    problems += problems_of_names(text)
    return problems


@pytest.mark.parametrize('page', PAGES)
def test_what_a_page_names_exists(page):
    assert problems_of((ROOT / page).read_text(), page) == []


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('```bash\nls\n```', 'line 1: the block has no mark'),
        ('<!-- needs: luck -->\n```bash\nls\n```', 'no such reasons'),
        ('<!-- needs: GPUs -->\n\n```bash\nls\n```', 'the block has no mark'),  # not right above
        ('<!-- tested by: tests/test_docs.py::test_none -->\n```bash\nls\n```', 'no test'),
        ('<!-- tested by: tests/none.py::test_none -->\n```bash\nls\n```', 'no test'),
        ('<!-- runs after: none.md -->\n```bash\nls\n```', 'no page'),
        ('<!-- merged into: configs/none.py -->\n```python\na = 1\n```', 'no config'),
        ('<!-- runs -->\n```text\nls\n```', 'needs no mark'),
        ('```\nls\n```', 'language'),
        ('`configs/coco/none.py`', 'no file'),
        ('see tools/none.py', 'no file'),
        ('```text\npython tools/train.py CONFIG [--none]\n```', 'tools/train.py has no option'),
        ('```text\nbash tools/dist_train.sh C 8 \\\n    --none\n```', 'has no option --none'),
        ('`python tools/infer.py CONFIG\n--none`', 'tools/infer.py has no option'),
        ('`--none`', 'no tool has the option'),
        ('`mmlinglo.none`', 'there is no mmlinglo.none'),
        ('`mmlinglo.utils.none`', 'there is no mmlinglo.utils.none'),
        ('`--cfg-options model.backbone.none=1`', 'no argument'),
    ],
)
def test_problems_are_found(text, problem):
    found = problems_of(text, 'docs/README.md')
    assert any(problem in each for each in found), found


def marked(kind: str) -> List[Tuple[str, Block]]:
    return [
        (page, block)
        for page in PAGES
        for block in blocks_of((ROOT / page).read_text())
        if block.language in RUNNABLE and block.mark.partition(':')[0] == kind
    ]


# Pieces of configs


@pytest.mark.slow
@pytest.mark.parametrize(
    'block',
    [pytest.param(block, id=f'{page}:{block.line}') for page, block in marked('merged into')],
)
def test_piece_of_a_config(block, tmp_path):
    base = block.mark.partition(': ')[2]
    file = tmp_path / 'config.py'
    file.write_text(f'_base_ = {base if "::" in base else str(ROOT / base)!r}\n{block.code}')
    cfg = Config.fromfile(file)
    assert cfg.pretty_text != Config.fromfile(with_base(base, tmp_path)).pretty_text
    init_default_scope(cfg.default_scope)
    model = build_model(cfg)
    if 'LinGlo' in block.code:
        assert isinstance(model.backbone, mmlinglo.LinGlo)
    if cfg.optim_wrapper.type == 'AmpOptimWrapper':
        cfg.optim_wrapper.pop('dtype', None)
        cfg.optim_wrapper.type = 'OptimWrapper'  # the other one refuses to be built without a GPU
    build_optim_wrapper(model, cfg.optim_wrapper)
    for hook in [*cfg.get('custom_hooks', []), *cfg.default_hooks.values()]:
        if hook.type in block.code:
            HOOKS.build(hook)


def with_base(base: str, folder: Path) -> Path:
    file = folder / 'base.py'
    file.write_text(f'_base_ = {base if "::" in base else str(ROOT / base)!r}\n')
    return file


# Pages that run


class Sandbox:
    """A copy of the checkout in which pages are run, each once."""

    def __init__(self, root: Path, env: dict) -> None:
        self.root = root
        self.env = env
        self.failures: Dict[str, str] = {}

    def run_page(self, page: str) -> None:
        """Run the marked blocks of a page, those of the pages that it builds on before."""
        if page not in self.failures:
            self.failures[page] = 'it is in progress'  # pages do not build on one another
            blocks = [
                block
                for block in blocks_of((ROOT / page).read_text())
                if block.mark.startswith(('runs', 'continues'))
            ]
            for block in blocks:
                if block.mark.startswith('runs after: '):
                    other = beside(page, block.mark.partition(': ')[2])
                    self.run_page(os.path.relpath(other, ROOT))
            self.failures[page] = self.run_blocks(blocks)
        assert not self.failures[page], f'{page} {self.failures[page]}'

    def run_blocks(self, blocks: List[Block]) -> str:
        """What went wrong, or ''."""
        for language, line, code in programs_of(blocks):
            script = self.root / 'block'
            script.write_text(code)
            command = {'bash': ['bash', '-euo', 'pipefail'], 'python': ['python']}[language]
            file = script.rename(script.with_suffix('.py' if language == 'python' else '.sh'))
            result = subprocess.run(
                [*command, file],
                cwd=self.root,
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=600,
                check=False,
            )
            if result.returncode:
                return f'line {line} ended with {result.returncode}:\n{result.stdout[-4000:]}'
        return ''


def programs_of(blocks: List[Block]) -> List[Tuple[str, int, str]]:
    """Language, line and code of blocks, with those that continue them."""
    programs: List[Tuple[str, int, str]] = []
    for block in blocks:
        if block.mark == 'continues':
            language, line, code = programs.pop()
            programs.append((language, line, code + block.code))
        else:
            programs.append((block.language, block.line, block.code))
    return programs


@pytest.fixture(scope='session')
def sandbox(tmp_path_factory):
    root = tmp_path_factory.mktemp('docs') / 'mmlinglo'
    left_out = ('.*', '__pycache__', 'data', 'work_dirs', 'results', 'tests')
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*left_out))
    make_shapes = root / 'tools/misc/make_shapes.py'
    text = make_shapes.read_text()
    call = 'args = parse_args(argv)'
    assert text.count(call) == 1
    smaller = f'import sys; sys.argv[1:1] = {SMALLER["make_shapes"].split()}; {call}'
    make_shapes.write_text(text.replace(call, smaller))
    env = {
        **os.environ,
        'CUDA_VISIBLE_DEVICES': '',
        'MPLBACKEND': 'Agg',
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(root),
    }
    env.pop('DATA_ROOT', None)
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        with preloaded_python(Path(folder) / 'bin', env) as python:
            # PYTHON_EXEC: by which torchrun starts its workers
            env.update(PYTHON=str(python), PYTHON_EXEC=str(python))
            env['PATH'] = f'{python.parent}{os.pathsep}{env["PATH"]}'
            yield Sandbox(root, env)


@pytest.mark.slow
@pytest.mark.parametrize(
    'page', sorted({page for kind in ('runs', 'runs after') for page, _ in marked(kind)})
)
def test_page_runs(page, sandbox):
    if page in NOT_WITH_THE_ORIGINALS and mmengine.__version__ == '0.10.7':
        pytest.skip(NOT_WITH_THE_ORIGINALS[page])
    sandbox.run_page(page)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('language', 'code'),
    [
        ('bash', 'false\ntrue\n'),
        ('bash', 'false | true\n'),
        ('bash', 'python -c "import sys; sys.exit(3)"\n'),
        ('bash', 'python tools/train.py configs/none.py\n'),
        ('python', 'raise ValueError\n'),
        ('python', 'import os; os.kill(os.getpid(), 9)\n'),
    ],
)
def test_failures_are_seen(language, code, sandbox):
    good = Block(language, 'runs', {'bash': 'true\n', 'python': 'a = 1\n'}[language], 1)
    assert sandbox.run_blocks([good]) == ''
    assert 'line 7 ended with' in sandbox.run_blocks([good, Block(language, 'runs', code, 7)])


# The pictures


@pytest.mark.parametrize('script', ['draw_diagrams', 'draw_results'])
def test_drawings_show_the_modules_and_the_results(script, tmp_path, monkeypatch):
    images = ROOT / 'docs/images'
    monkeypatch.syspath_prepend(str(ROOT / 'docs'))
    monkeypatch.setattr(sys, 'argv', [script])
    module = importlib.import_module(script)
    monkeypatch.setattr(module, 'IMAGES', tmp_path)
    module.main()
    drawn = sorted(tmp_path.iterdir())
    assert drawn
    for path in drawn:
        assert path.read_text() == (images / path.name).read_text(), f'run docs/{script}.py'


# The site


def build_site(root: Path, out: Path) -> subprocess.CompletedProcess:
    command = ['-m', 'sphinx', '-q', '-W', '--keep-going', '-E', '-c', root / 'docs', root, out]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_site_builds_without_a_warning(tmp_path):
    result = build_site(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / 'docs/api/backbone.html').read_text()
    for name in inspect.signature(mmlinglo.LinGlo).parameters:
        assert f'<strong>{name}</strong>' in reference, f'{name} is not described'
    assert 'docs/README.html' in (tmp_path / 'index.html').read_text()


def test_site_needs_every_link_and_every_page(tmp_path):
    shutil.copytree(
        ROOT / 'docs', tmp_path / 'docs', ignore=shutil.ignore_patterns('*.md', '*.rst')
    )
    page = '# Page\n\n[a](none.md) [b](none.py) [c](#none) [d](README.md#none)\n'
    (tmp_path / 'docs/page.md').write_text(page)
    (tmp_path / 'docs/README.md').write_text('# Index\n\n## Part\n\n- [e](page.md)\n')
    (tmp_path / 'docs/forgotten.md').write_text('# Forgotten\n')
    result = build_site(tmp_path, tmp_path / 'site')
    assert result.returncode != 0
    for target in ("'none.md'", "'none.py'", "'none'", "'docs/README'"):
        assert re.search(rf'docs/page.md:3: WARNING: .*{target}', result.stderr), target
    assert re.search(r'docs/forgotten.md: WARNING: .*toctree', result.stderr)
    assert result.stderr.count('WARNING') == 5
