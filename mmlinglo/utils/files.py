# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give the name of a new file to write, which is moved to ``path`` if nothing fails.

    On an error ``path`` stays as it was and nothing is left behind.

    Args:
        path: Where the file is to be; its folder is made.

    Yields:
        Name of an empty file in the same folder and with the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
