# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""A Python that has imported torch and the toolboxes already, for commands that are run one after another.

It forks for each command, which spares most of a command's time. mmlinglo itself is imported by the commands.
"""

import atexit
import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Iterator, List

PRELOADED = (
    'torch',
    'matplotlib.pyplot',
    'mmengine.runner',
    'mmcv.ops',
    'mmdet.apis',
    'mmseg.apis',
    'mmpretrain.apis',
)
CLIENT = """
import json, os, socket, struct, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    message = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [struct.pack('!Q', len(message))], [0, 1, 2])
    server.sendall(message)
    status = server.recv(1)
sys.exit(status[0] if status else 255)
"""


@contextlib.contextmanager
def preloaded_python(folder: Path, env: dict) -> Iterator[Path]:
    """Put a program ``python`` into a folder.

    It takes what Python takes, with the options ``-u`` and ``-W``; all else it passes to the real one.
    """
    folder.mkdir(parents=True)
    address = str(folder / 'socket')
    (folder / 'client.py').write_text(CLIENT.format(address=address))
    program = folder / 'python'
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -ISB {folder}/client.py "$@"\n')
    program.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], env=env)
    try:
        while not os.path.exists(address):
            if server.poll() is not None:
                raise RuntimeError('the preloaded Python ended at once')
            time.sleep(0.05)
        yield program
    finally:
        server.terminate()
        server.wait()


def serve(address: str) -> None:
    """Answer until the process that started this one stops it, or ends."""
    parent = os.getppid()
    for name in PRELOADED:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f'{address}.new')
    listener.listen()
    os.rename(f'{address}.new', address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the connections' processes
    while os.getppid() == parent:
        if not select.select([listener], [], [], 1)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(answer(connection))
        connection.close()


def answer(connection: socket.socket) -> int:
    """In a process of the connection's own: run the command in a child, send its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    message = b''
    while len(message) < struct.unpack('!Q', head)[0]:
        message += connection.recv(2**16)
    args, folder, env = json.loads(message)
    child = os.fork()
    if child == 0:
        connection.close()
        for i, descriptor in enumerate(descriptors):
            os.dup2(descriptor, i)
            os.close(descriptor)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(env)
        os._exit(command_status(args))
    ended = 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and select.select([connection], [], [], 0.02)[0]:  # the client was killed
            os.kill(child, signal.SIGKILL)
            return 1
    status = os.waitstatus_to_exitcode(status)
    connection.sendall(bytes([status if status >= 0 else 128 - status]))
    return 0


def command_status(args: List[str]) -> int:
    """Run a command as Python would, to its end; its exit status."""
    status = 0
    try:
        run_command(args)
    except SystemExit as error:
        status = error.code
        if not isinstance(status, int):
            if status is not None:
                print(status, file=sys.stderr)
            status = int(status is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for process in multiprocessing.active_children():
        process.terminate()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status & 255


def run_command(args: List[str]) -> None:
    rest = list(args)
    while rest and rest[0] in ('-u', '-W'):
        rest = rest[1:] if rest[0] == '-u' else rest[2:]
    sys.path[1:1] = [
        path
        for path in os.environ.get('PYTHONPATH', '').split(os.pathsep)
        if path and path not in sys.path
    ]
    if rest and rest[0] in ('-c', '-'):
        code = rest.pop(1) if rest[0] == '-c' else sys.stdin.read()
        sys.path[0] = ''
        sys.argv = rest
        exec(compile(code, '<string>', 'exec'), {'__name__': '__main__'})
    elif rest and rest[0] == '-m':
        sys.path[0] = os.getcwd()
        sys.argv = ['-m', *rest[2:]]
        runpy.run_module(rest[1], run_name='__main__', alter_sys=True)
    elif rest and rest[0].endswith('.py'):
        sys.path[0] = os.path.dirname(os.path.abspath(rest[0]))
        sys.argv = rest
        runpy.run_path(rest[0], run_name='__main__')
    else:
        os.execv(sys.executable, [sys.executable, *args])


if __name__ == '__main__':
    serve(sys.argv[1])
