# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all.

    Write to the file that this yields. It replaces ``path`` at the end. After an error, ``path``
    is as it was before, and nothing else remains.

    Args:
        path: The file to write. Its folder is created if it is missing.

    Yields:
        Path of an empty file in the same folder, with the same suffix.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, 'is a folder: name a file')
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    except OSError as error:  # about the folder, or a file that nobody has named
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
