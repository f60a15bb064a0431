# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Download COCO or ADE20K and unpack it in the layout that the recipes read.

First shows the files, the licence and the disk space that is needed, and asks. After a cut
connection or an interruption, the same command goes on where it stopped.
"""

import argparse
import shutil
import sys
import time
import zipfile
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Optional, Sequence
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.filesize import decimal
from rich.progress import track, wrap_file
from torchvision.datasets.utils import calculate_md5

from mmlinglo.utils.cli import UsageError, run

TRIES = 5  # one after another that bring no new byte
PAUSE = 3.0  # seconds after the first of them; longer after each further one
TIMEOUT = 60.0  # seconds without a byte
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError)
AGAIN = 'run the same command again: it goes on where it stopped'
SCREEN = Console(stderr=True)


class File(NamedTuple):
    """A zip: address, md5 sum, bytes, bytes on disk when unpacked (rounded up), folder in it."""

    url: str
    md5: str
    size: int
    unpacked: int
    folder: str


COCO = 'http://images.cocodataset.org/'
ADE = 'http://data.csail.mit.edu/places/ADEchallenge/'
# fmt: off
DATASETS = dict(  # folder, terms of use, recipe that reads the data, files
    coco=('coco', 'pictures by the Flickr terms of use, annotations CC BY 4.0: '
          'https://cocodataset.org/#termsofuse', 'coco/retinanet_linglo-b0_fpn_1x_coco', (
        File(COCO + 'annotations/annotations_trainval2017.zip',
             'f4bbac642086de4f52a3fdda2de5fa2c', 252_907_541, 840_000_000, 'annotations'),
        File(COCO + 'zips/val2017.zip',
             '442b8da7639aecaf257c1dceb8ba8c80', 815_585_330, 850_000_000, 'val2017'),
        File(COCO + 'zips/train2017.zip',
             'cced6f7f71b7629ddf16f17bbcfab6b2', 19_336_861_798, 20_000_000_000, 'train2017'))),
    ade20k=('ade', 'non-commercial research and education only; software and annotations BSD-3: '
            'https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/',
            'ade20k/fpn_linglo-b0_8xb4-40k_ade20k-512x512', (
        File(ADE + 'ADEChallengeData2016.zip', '7328b3957e407ddae1d3cbf487f149ef',
             967_382_037, 1_200_000_000, 'ADEChallengeData2016'),)),
)
# fmt: on


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def receive(file: File, part: Path) -> None:
    """Ask the server once for what is missing of a file. A server that cannot continue it starts over.

    Raises:
        UsageError: If the server has another file.
        OSError, HTTPException: If the network fails, or the disk.
    """
    start = size_of(part)
    request = Request(file.url, headers={'Range': f'bytes={start}-'} if start else {})
    with urlopen(request, timeout=TIMEOUT) as response:
        start = start if response.status == 206 else 0
        size = start + int(response.headers.get('Content-Length', file.size - start))
        if size != file.size:  # the page of a proxy must not replace hours of download
            raise UsageError(
                f'{file.url}: the server offers {size:,} bytes, expected {file.size:,}. Look in a '
                f'browser whether a proxy or a login page is in between, and {AGAIN}'
            )
        bar = wrap_file(response, file.size - start, description=part.stem, console=SCREEN)
        with part.open('ab' if start else 'wb') as out, bar as source:
            shutil.copyfileobj(source, out, 1 << 20)
    if size_of(part) < file.size:
        raise ConnectionError('the connection was cut')


def download(file: File, part: Path) -> None:
    """Download what is missing of a file, again while the network fails and between bytes arrive.

    Raises:
        UsageError: If the network fails too often, or the server does not have the file.
    """
    tries, furthest = 0, size_of(part)
    while size_of(part) < file.size:
        try:
            receive(file, part)
        except NETWORK_ERRORS as error:
            reason = f'{file.url}: {str(error) or type(error).__name__}'
            refused = isinstance(error, HTTPError) and error.code < 500 and error.code != 429
            tries = 1 if size_of(part) > furthest else tries + 1
            furthest = max(furthest, size_of(part))
            if refused or tries == TRIES:
                raise UsageError(f'{reason}. Later, {AGAIN}') from error
            SCREEN.print(f'{reason}; trying again', markup=False, soft_wrap=True)
            time.sleep(PAUSE * tries)


def fetch(file: File, root: Path, keep_zip: bool) -> None:
    """Download, check and unpack a zip. Its folder appears when it is complete.

    Raises:
        UsageError: If it cannot be downloaded, or its md5 sum is wrong. What this tool has
            downloaded is removed then.
    """
    path = source = root / Path(file.url).name
    if not path.exists():  # else of a start with --keep-zips, or downloaded by other means
        source = path.with_suffix('.zip.part')
        download(file, source)
    SCREEN.print(f'checking the md5 sum of {source.name}')
    digest = calculate_md5(source)
    if digest != file.md5:
        if source != path:
            source.unlink()
        remedy = 'Remove it and' if source == path else 'It is removed;'
        raise UsageError(
            f'{source} has wrong bytes: md5 sum {digest}, expected {file.md5}. {remedy} '
            f'run the same command again, which downloads {file.url} from the start'
        )
    source.replace(path)
    with TemporaryDirectory('.unpacking', '.', root) as work, zipfile.ZipFile(path) as archive:
        for member in track(archive.infolist(), f'unpacking {path.name}', console=SCREEN):
            archive.extract(member, work)  # drops from the name what leads out of `work`
        Path(work, file.folder).replace(root / file.folder)
    if not keep_zip:
        path.unlink()


def confirm(files: Sequence[File], root: Path, licence: str, yes: bool) -> bool:
    """Show what will be downloaded, and ask unless ``yes``.

    Raises:
        UsageError: If the disk is too small, or nobody can be asked.
    """
    needed = 0
    for file in files:
        zip_path = root / Path(file.url).name
        here = size_of(zip_path) or size_of(zip_path.with_suffix('.zip.part'))
        needed += file.size - here + file.unpacked
        print(f'{file.url}: {decimal(file.size)}, {decimal(here)} of it here')
    place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    space = f'disk space: {decimal(needed)} needed, {decimal(free)} free in {place}'
    print(f'licence: {licence}\n{space}')
    if needed > free:
        raise UsageError(f'{space}. Free some, or name a folder on another disk with --out')
    if not yes and not sys.stdin.isatty():
        raise UsageError('nobody can be asked here: accept the licence with --yes')
    return yes or input('Download? [y/N] ').strip().lower() in ('y', 'yes')


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dataset', choices=DATASETS)
    parser.add_argument('--out', default='data', help='folder for data sets; default: %(default)s')
    parser.add_argument('--yes', action='store_true', help='accept the licence; do not ask')
    parser.add_argument('--keep-zips', action='store_true', help='keep the zips after unpacking')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    folder, licence, config, files = DATASETS[args.dataset]
    root, missing = Path(args.out).expanduser() / folder, []
    for stale in root.glob('.*.unpacking'):  # of a start that was killed
        shutil.rmtree(stale, ignore_errors=True)
    for file in files:
        if any((root / file.folder).glob('*')):
            print(f'{root / file.folder} is there already: skipped')
        else:
            missing.append(file)
    try:
        if missing and not confirm(missing, root, licence, args.yes):
            print('nothing downloaded')
            return 1
        root.mkdir(parents=True, exist_ok=True)
        for file in missing:
            fetch(file, root, args.keep_zips)
    except OSError as error:
        raise UsageError(f'cannot fill {root}: {error}. Mend that and {AGAIN}') from error
    except (EOFError, KeyboardInterrupt) as error:
        raise UsageError(f'interrupted. To finish, {AGAIN}') from error
    print(f'{root} is complete. Check it: python tools/misc/check_dataset.py configs/{config}.py')
    return 0


if __name__ == '__main__':
    run(main)
