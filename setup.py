# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MIM_CONTENT = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Put configs and tools into ``mmlinglo/.mim``, where mim looks; as links in an editable install."""

    def run(self) -> None:
        super().run()
        editable = getattr(self, 'editable_mode', False)
        mim = (ROOT if editable else Path(self.build_lib)) / 'mmlinglo' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in MIM_CONTENT:
            if editable:
                (mim / name).symlink_to(os.path.relpath(ROOT / name, mim))
            elif (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, mim / name, ignore=shutil.ignore_patterns('__pycache__')
                )
            else:
                shutil.copy(ROOT / name, mim / name)


def version() -> str:
    scope: dict = {}
    exec((ROOT / 'mmlinglo/version.py').read_text(), scope)
    return scope['__version__']


def requirements(name: str) -> list:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name='mmlinglo',
    version=version(),
    description='LinGlo vision backbones (arXiv 2207.00188) for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    packages=find_packages(include=['mmlinglo', 'mmlinglo.*']),
    include_package_data=True,
    install_requires=requirements('runtime'),
    extras_require={name: requirements(name) for name in ('mminstall', 'analysis', 'tests')},
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
