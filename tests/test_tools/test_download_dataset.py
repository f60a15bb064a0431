# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The tool as it is, with a server of our own and its table pointed there."""

import errno
import hashlib
import io
import shutil
import sys
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import ROOT, import_tool, run_tool
from mmengine.config import Config

from mmlinglo.utils.cli import UsageError

PATH = 'tools/misc/download_dataset.py'
tool = import_tool(PATH)
CONTENTS = {
    'annotations_trainval2017.zip': {
        'annotations/instances_train2017.json': b'[1]',
        'annotations/instances_val2017.json': b'[2]',
    },
    'val2017.zip': {'val2017/000000000139.jpg': b'a picture of COCO' * 200},
    'train2017.zip': {
        'train2017/000000000009.jpg': bytes(range(256)) * 20,
        'train2017/000000000025.jpg': b'',
    },
    'ADEChallengeData2016.zip': {
        'ADEChallengeData2016/images/training/ADE_train_00000001.jpg': b'picture',
        'ADEChallengeData2016/annotations/training/ADE_train_00000001.png': b'labels',
        'ADEChallengeData2016/images/validation/ADE_val_00000001.jpg': b'picture 2',
        'ADEChallengeData2016/annotations/validation/ADE_val_00000001.png': b'labels 2',
    },
}
ADE = 'ADEChallengeData2016.zip'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path[1:]
        asked = self.headers['Range']
        server.requests.append((name, asked))
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        data = server.files[name]
        start = int(asked[len('bytes=') : -1]) if asked and server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        if server.lengths:
            self.send_header('Content-Length', len(data) - start)
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(data[start:][:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server with small zips, and the tool's table pointed to it.

    ``requests`` lists what it was asked. ``cuts`` are the numbers of bytes after which it cuts the
    connection, one for each answer, and ``statuses`` those that it answers first.
    """
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.files, server.requests, server.cuts, server.statuses = {}, [], [], []
    server.ranges = server.lengths = True
    for name, members in CONTENTS.items():
        put(server, name, members)
    for name, (folder, licence, config, files) in tool.DATASETS.items():
        files = tuple(point_to(server, file) for file in files)
        monkeypatch.setitem(tool.DATASETS, name, (folder, licence, config, files))
    monkeypatch.setattr(tool, 'PAUSE', 0)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def put(server, name, members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    server.files[name] = buffer.getvalue()


def point_to(server, file):
    """A row of the table with another address, sum and size."""
    name = Path(file.url).name
    data = server.files[name]
    url = f'http://127.0.0.1:{server.server_port}/{name}'
    return file._replace(url=url, md5=hashlib.md5(data).hexdigest(), size=len(data), unpacked=9000)


def files_in(folder):
    paths = (path for path in folder.rglob('*') if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def contents(*names):
    return {member: content for name in names for member, content in CONTENTS[name].items()}


def broken(data):
    return bytes([data[0] ^ 1]) + data[1:]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ('name', 'base', 'files'),
    [
        ('coco', 'coco_detection', [*CONTENTS][:3]),
        ('ade20k', 'ade20k_512x512', [ADE]),
    ],
)
def test_layout_is_that_of_the_recipes(server, name, base, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = tool.DATASETS[name]
    assert tool.main([name, '--yes']) == 0
    assert files_in(tmp_path / 'data' / table[0]) == contents(*files)  # and neither zips nor parts
    assert not list(tmp_path.rglob('.*'))
    assert [request for request, _ in server.requests] == files
    for split in ('train', 'val'):
        dataset = Config.fromfile(ROOT / f'configs/_base_/datasets/{base}.py')[
            f'{split}_dataloader'
        ]
        for path in (dataset.dataset.get('ann_file', ''), *dataset.dataset.data_prefix.values()):
            assert (tmp_path / dataset.dataset.data_root / path).exists()

    printed = capsys.readouterr().out
    recipe = printed.split('python tools/misc/check_dataset.py ')[1].strip()
    assert (ROOT / recipe).is_file()
    assert (
        f'configs/_base_/datasets/{base}.py'.rpartition('/')[2]
        in Config.fromfile(ROOT / recipe).text
    )
    for text in (*(file.url for file in table[3]), table[1], 'disk space: '):
        assert text in printed

    # nothing is asked for twice, neither from the server nor from the user
    monkeypatch.setattr(sys, 'stdin', io.StringIO())
    before = list(server.requests)
    assert tool.main([name]) == 0
    assert server.requests == before
    assert capsys.readouterr().out.count('is there already: skipped') == len(files)


def test_only_what_is_missing_is_downloaded(server, tmp_path):
    (tmp_path / 'coco/val2017').mkdir(parents=True)
    (tmp_path / 'coco/val2017/mine.jpg').write_bytes(b'mine')
    (tmp_path / 'coco/train2017').mkdir()  # empty: not there
    assert tool.main(['coco', '--out', str(tmp_path), '--yes']) == 0
    expected = contents('annotations_trainval2017.zip', 'train2017.zip')
    assert files_in(tmp_path / 'coco') == {**expected, 'val2017/mine.jpg': b'mine'}
    assert 'val2017.zip' not in dict(server.requests)


def test_zips_that_are_kept_are_used_again(server, tmp_path):
    args = ['coco', '--out', str(tmp_path), '--yes', '--keep-zips']
    names = [*CONTENTS][:3]
    everything = {**contents(*names), **{name: server.files[name] for name in names}}
    assert tool.main(args) == 0
    assert files_in(tmp_path / 'coco') == everything
    shutil.rmtree(tmp_path / 'coco/train2017')
    server.requests.clear()
    assert tool.main(args) == 0
    assert files_in(tmp_path / 'coco') == everything
    assert server.requests == []


@pytest.mark.parametrize('lengths', [True, False], ids=['length', 'no-length'])
def test_goes_on_after_a_cut(server, lengths, tmp_path):
    server.cuts, server.lengths = [300, 200], lengths
    assert tool.main(['ade20k', '--out', str(tmp_path), '--yes']) == 0
    assert server.requests == [(ADE, None), (ADE, 'bytes=300-'), (ADE, 'bytes=500-')]
    assert files_in(tmp_path / 'ade') == contents(ADE)


def test_the_next_start_goes_on(server, tmp_path, capsys):
    args = ['ade20k', '--out', str(tmp_path), '--yes']
    url = tool.DATASETS['ade20k'][3][0].url
    server.cuts = [0, 300, 0, 100] + [0] * tool.TRIES
    with pytest.raises(UsageError, match=r'connection was cut\. Later, run the same') as info:
        tool.main(args)
    assert url in str(info.value)
    # an attempt that brings something does not count
    ranges = [None, None, *['bytes=300-'] * 2, *['bytes=400-'] * (tool.TRIES - 1)]
    assert server.requests == [(ADE, part) for part in ranges]
    assert files_in(tmp_path) == {f'ade/{ADE}.part': server.files[ADE][:400]}

    server.requests.clear()
    server.cuts.clear()
    capsys.readouterr()
    assert tool.main(args) == 0
    assert server.requests == [(ADE, 'bytes=400-')]
    assert f'{url}: {len(server.files[ADE])} bytes, 400 bytes of it here' in capsys.readouterr().out
    assert files_in(tmp_path / 'ade') == contents(ADE)


def test_a_server_that_ignores_ranges(server, tmp_path):
    server.ranges, server.cuts = False, [300, 200]
    assert tool.main(['ade20k', '--out', str(tmp_path), '--yes']) == 0
    assert server.requests == [(ADE, None), (ADE, 'bytes=300-'), (ADE, 'bytes=200-')]
    assert files_in(tmp_path / 'ade') == contents(ADE)


def test_a_whole_part_is_not_downloaded_again(server, tmp_path):
    (tmp_path / 'ade').mkdir()
    (tmp_path / f'ade/{ADE}.part').write_bytes(server.files[ADE])
    assert tool.main(['ade20k', '--out', str(tmp_path), '--yes']) == 0
    assert files_in(tmp_path / 'ade') == contents(ADE)
    assert server.requests == []


@pytest.mark.parametrize('resumed', [False, True])
def test_wrong_bytes(server, resumed, tmp_path):
    right, wrong = server.files[ADE], broken(server.files[ADE])
    if resumed:  # the rest is right
        (tmp_path / 'ade').mkdir()
        (tmp_path / f'ade/{ADE}.part').write_bytes(wrong[:300])
    else:
        server.files[ADE] = wrong
    with pytest.raises(UsageError, match='wrong bytes') as info:
        tool.main(['ade20k', '--out', str(tmp_path), '--yes'])
    for text in (ADE, *(hashlib.md5(data).hexdigest() for data in (right, wrong))):
        assert text in str(info.value)
    assert server.requests == [(ADE, 'bytes=300-' if resumed else None)]
    assert list((tmp_path / 'ade').iterdir()) == []

    server.files[ADE] = right
    assert tool.main(['ade20k', '--out', str(tmp_path), '--yes']) == 0
    assert server.requests[1:] == [(ADE, None)]
    assert files_in(tmp_path / 'ade') == contents(ADE)


def test_a_wrong_zip_of_the_user_is_not_removed(server, tmp_path):
    (tmp_path / 'ade').mkdir()
    (tmp_path / 'ade' / ADE).write_bytes(b'mine')
    with pytest.raises(UsageError, match='Remove it and run the same command again'):
        tool.main(['ade20k', '--out', str(tmp_path), '--yes'])
    assert files_in(tmp_path) == {f'ade/{ADE}': b'mine'}
    assert server.requests == []


def test_the_page_of_a_proxy_replaces_nothing(server, tmp_path):
    (tmp_path / 'ade').mkdir()
    (tmp_path / f'ade/{ADE}.part').write_bytes(server.files[ADE][:300])
    expected = len(server.files[ADE])
    server.files[ADE], server.ranges = b'<html>please log in</html>', False
    with pytest.raises(UsageError, match=f'offers 26 bytes, expected {expected:,}'):
        tool.main(['ade20k', '--out', str(tmp_path), '--yes'])
    assert (tmp_path / f'ade/{ADE}.part').stat().st_size == 300


def test_statuses(server, tmp_path):
    args = ['ade20k', '--out', str(tmp_path), '--yes']
    url = tool.DATASETS['ade20k'][3][0].url
    server.statuses = [404]
    with pytest.raises(UsageError, match=f'{url}: HTTP Error 404: .* run the same command again'):
        tool.main(args)
    assert len(server.requests) == 1
    server.statuses = [503] * tool.TRIES
    with pytest.raises(UsageError, match=f'{url}: HTTP Error 503: .* run the same command again'):
        tool.main(args)
    assert len(server.requests) == 1 + tool.TRIES
    assert files_in(tmp_path) == {}
    server.statuses = [503, 429]  # busy for a moment
    assert tool.main(args) == 0
    assert files_in(tmp_path / 'ade') == contents(ADE)


def test_no_network(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UsageError, match=r'refused.* Later, run the same command again') as info:
        tool.main(['coco', '--out', str(tmp_path), '--yes'])
    assert tool.DATASETS['coco'][3][0].url in str(info.value)
    assert files_in(tmp_path) == {}


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='the disk that is always full')
def test_a_full_disk_while_downloading(server, tmp_path):
    (tmp_path / 'ade').mkdir()
    (tmp_path / f'ade/{ADE}.part').symlink_to('/dev/full')
    with pytest.raises(UsageError, match=r'No space left on device.* goes on where it stopped'):
        tool.main(['ade20k', '--out', str(tmp_path), '--yes'])
    assert server.requests == [(ADE, None)]


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (KeyboardInterrupt(), 'interrupted. To finish, run the same'),
        (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device'),
    ],
    ids=['interrupted', 'disk-full'],
)
def test_an_interrupted_unpacking_is_not_taken_for_done(
    server, error, message, tmp_path, monkeypatch
):
    extract = zipfile.ZipFile.extract

    def extract_two(self, member, path):
        if member is self.infolist()[2]:
            raise error
        return extract(self, member, path)

    args = ['ade20k', '--out', str(tmp_path), '--yes']
    monkeypatch.setattr(zipfile.ZipFile, 'extract', extract_two)
    with pytest.raises(UsageError, match=message):
        tool.main(args)
    monkeypatch.setattr(zipfile.ZipFile, 'extract', extract)
    assert files_in(tmp_path) == {f'ade/{ADE}': server.files[ADE]}

    # the same, killed: nobody could remove the folder
    left = tmp_path / 'ade/.ADEChallengeData2016.unpacking/ADEChallengeData2016/images/half.jpg'
    left.parent.mkdir(parents=True)
    left.write_bytes(b'pic')
    assert tool.main(args) == 0
    assert files_in(tmp_path / 'ade') == contents(ADE)
    assert server.requests == [(ADE, None)]


def test_members_that_lead_out_of_the_folder(server, tmp_path, monkeypatch):
    members = {
        **CONTENTS[ADE],
        '../outside.txt': b'a',
        '../../../outside.txt': b'b',
        str(tmp_path / 'outside.txt'): b'c',
        'ADEChallengeData2016/../../outside.txt': b'd',
    }
    put(server, ADE, members)
    folder, licence, config, (file,) = tool.DATASETS['ade20k']
    monkeypatch.setitem(
        tool.DATASETS, 'ade20k', (folder, licence, config, (point_to(server, file),))
    )
    out = tmp_path / 'a/b'
    assert tool.main(['ade20k', '--out', str(out), '--yes']) == 0
    written = {path for path in tmp_path.rglob('*') if path.is_file()}
    target = out / 'ade/ADEChallengeData2016'
    assert written == {out / 'ade' / name for name in CONTENTS[ADE]} | {target / 'outside.txt'}


def test_too_little_space(server, tmp_path, monkeypatch):
    (tmp_path / 'coco').mkdir()
    (tmp_path / 'coco/val2017.zip.part').write_bytes(server.files['val2017.zip'][:100])
    needed = sum(len(server.files[name]) for name in [*CONTENTS][:3]) - 100 + 3 * 9000
    usage = namedtuple('usage', 'total used free')

    def start(free):
        monkeypatch.setattr(tool.shutil, 'disk_usage', lambda _: usage(0, 0, free))
        return tool.main(['coco', '--out', str(tmp_path), '--yes'])

    with pytest.raises(UsageError, match=r'disk space: \d.* needed, \d.* free') as info:
        start(needed - 1)
    assert info.value.args[0].count(f'{needed / 1000:.1f} kB') == 2
    assert server.requests == []
    assert start(needed) == 0


@pytest.mark.parametrize(
    ('answer', 'status'), [('y\n', 0), ('YES\n', 0), ('n\n', 1), ('\n', 1), ('yet\n', 1)]
)
def test_asks(server, answer, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', Terminal(answer))
    assert tool.main(['ade20k', '--out', str(tmp_path)]) == status
    assert capsys.readouterr().out.count('Download? [y/N] ') == 1
    assert len(server.requests) == (0 if status else 1)
    assert files_in(tmp_path / 'ade') == ({} if status else contents(ADE))


def test_nobody_to_ask(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('y\n'))
    with pytest.raises(UsageError, match='--yes'):
        tool.main(['ade20k', '--out', str(tmp_path)])
    assert 'licence: ' in capsys.readouterr().out  # what --yes accepts
    monkeypatch.setattr(sys, 'stdin', Terminal(''))  # Ctrl-D
    with pytest.raises(UsageError, match='interrupted'):
        tool.main(['ade20k', '--out', str(tmp_path)])
    assert server.requests == []
    assert files_in(tmp_path) == {}


@pytest.mark.slow
def test_command_line(tmp_path):
    """Without --yes, so that nothing is downloaded from the real servers."""
    result = run_tool(PATH, 'ade20k', '--out', tmp_path, check=False)
    assert result.returncode == 1
    assert 'ADEChallengeData2016.zip: 967.4 MB' in result.stdout
    assert 'https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/' in result.stdout
    assert result.stderr.strip().startswith('error: ')
    assert '--yes' in result.stderr
    assert list(tmp_path.iterdir()) == []
