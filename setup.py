# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The metadata is in pyproject.toml; this puts configs and tools into the package."""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MIM_CONTENT = ('configs', 'tools', 'model-index.yml')
NOT_FOR_USERS = (  # need a checkout, or write into it
    '__pycache__',
    'quickstart.sh',
    'run_tests.sh',
    'setup_env.sh',
    'update_model_zoo.py',
)


class BuildWithMim(build_py):
    """Put configs and tools into ``mmlinglo/.mim``, where mim looks; as links in an editable install."""

    def run(self) -> None:
        super().run()
        editable = getattr(self, 'editable_mode', False)
        mim = (ROOT if editable else Path(self.build_lib)) / 'mmlinglo' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        ignore = shutil.ignore_patterns(*NOT_FOR_USERS)
        for name in MIM_CONTENT:
            if editable:
                (mim / name).symlink_to(os.path.relpath(ROOT / name, mim))
            elif (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, mim / name, ignore=ignore)
            else:
                shutil.copy(ROOT / name, mim / name)


setup(cmdclass={'build_py': BuildWithMim})
