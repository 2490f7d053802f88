"""Commands of the project, run by forks of a process that has imported the engine: an import costs seconds each time.

:func:`python` is an executable to use in place of ``sys.executable``, and :func:`environment` sets the variables by
which launchers and torchrun take it. What a fork cannot show is that a command works in a fresh interpreter: of each
entry point, and of each family of launchers, one test starts a real one. A test that looks at a process from outside
(its children, its memory) needs a real one too.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver, process, resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.multiprocessing as torch_multiprocessing

PRELOADED = ["megatron_grit.training.trainer", "tests.harness.preloaded"]


def fork_context() -> Any:
    """Processes forked from one that has imported the engine and done nothing else: imports are paid for once."""
    context = torch_multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@cache
def python() -> str:
    """Path of the interpreter's stand-in. Starts the server at the first call."""
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    client, address = Path(__file__).with_name("python_client.py"), folder / "socket"
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -ISs "{client}" "{address}" "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    ready, said = torch_multiprocessing.get_context("forkserver").Pipe(duplex=False)
    server = fork_context().Process(target=_serve, args=(str(address), said), daemon=True)
    server.start()
    said.close()
    ready.recv()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(path)


def environment() -> dict[str, str]:
    """For launchers, and for torchrun, which starts its processes with PYTHON_EXEC."""
    return {"PYTHON": python(), "PYTHON_EXEC": python()}


def cli(
    arguments: Sequence[str], env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` in a fork; its status and what it printed."""
    variables = os.environ | environment() | (env or {})
    return subprocess.run(
        [python(), *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
    )


@dataclass
class _Job:
    client: socket.socket
    child: int
    ended: int
    """File descriptor that is readable once the child has ended."""


def _serve(address: str, said: Any) -> NoReturn:
    """Fork a process for each client; hand signals to it, and its exit status to the client."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of all that is imported
    said.send("ready")
    said.close()
    events = selectors.DefaultSelector()
    events.register(listening, selectors.EVENT_READ)
    parent = os.getppid()
    while os.getppid() == parent:
        for key, _ in events.select(timeout=5):
            if key.fileobj is listening:
                job = _start(listening)
                if job is not None:
                    events.register(job.ended, selectors.EVENT_READ, job)
                    events.register(job.client, selectors.EVENT_READ, job)
            elif key.fileobj == key.data.ended:
                job = key.data
                status = os.waitstatus_to_exitcode(os.waitpid(job.child, 0)[1])
                events.unregister(job.ended)
                os.close(job.ended)
                if job.client in events.get_map():
                    events.unregister(job.client)
                with suppress(OSError):
                    job.client.send(str(status).encode())
                job.client.close()
            elif key.fileobj in events.get_map():  # else it ended in this turn
                job = key.data
                numbers = job.client.recv(64)
                if not numbers:  # the client was killed, which nobody can pass on
                    events.unregister(job.client)
                for number in numbers or [signal.SIGKILL]:
                    os.kill(job.child, number)
    os._exit(0)


def _start(listening: socket.socket) -> _Job | None:
    """Fork what a client asks for. None where it has gone before it said it all."""
    client = listening.accept()[0]
    size, files, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb", buffering=0) as stream:
        request = b""
        while len(files) == 3 and len(request) < int.from_bytes(size, "little"):
            part = stream.read(int.from_bytes(size, "little") - len(request))
            if not part:
                break
            request += part
    if not size or len(request) < int.from_bytes(size, "little"):
        client.close()
        return None
    child = os.fork()
    if child == 0:
        listening.close()
        client.close()
        _run(request.split(b"\0"), files)
    for file in files:
        os.close(file)
    return _Job(client, child, os.pidfd_open(child))


def _run(request: list[bytes], files: list[int]) -> NoReturn:
    """In the child: be the interpreter that was asked for."""
    status = 70
    try:
        directory, count = os.fsdecode(request[0]), int(request[1])
        _become(directory, files, dict(pair.split(b"=", 1) for pair in request[2 + count :]))
        status = _status_of(_program([os.fsdecode(word) for word in request[2 : 2 + count]]))
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)


def _become(directory: str, files: list[int], variables: dict[bytes, bytes]) -> None:
    """Take over the client's directory, variables and files, and forget what multiprocessing knows of this process."""
    os.setsid()
    os.chdir(directory)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 4096)
    os.environb.clear()
    os.environb.update(variables)
    lines = 1 if os.environ.get("PYTHONUNBUFFERED") else -1
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=lines, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main: Any = process.current_process()
    main._identity, main._name, main._parent_pid, main._popen = (), "MainProcess", None, None
    main._config = {"authkey": process.AuthenticationString(os.urandom(32)), "semprefix": "/mp"}  # type: ignore[attr-defined]
    process._parent_process, process._children = None, set()  # type: ignore[attr-defined]
    process.ORIGINAL_DIR = directory  # type: ignore[attr-defined]
    resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
    forkserver._forkserver.__init__()  # type: ignore[attr-defined,misc]
    sys.path[:] = [each for each in sys.path if each]


def _program(arguments: list[str]) -> Any:
    """What is to be run, as a function: options of the interpreter are dealt with."""
    while arguments and arguments[0].startswith("-") and arguments[0] != "-m":
        word = arguments.pop(0)
        if word == "-W":
            sys.warnoptions.append(arguments.pop(0))
        elif word == "-X":
            arguments.pop(0)
    sys.warnoptions[:0] = filter(None, os.environ.get("PYTHONWARNINGS", "").split(","))
    warnings._processoptions(sys.warnoptions)  # type: ignore[attr-defined]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(sys.argv[0], None)  # runpy warns of a module that was imported before it is run
        return lambda: runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    return lambda: runpy.run_path(sys.argv[0], run_name="__main__")


def _status_of(program: Any) -> int:
    """Run it; the exit status as the interpreter would have it, negative where it ends by a signal."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # the interpreter would not have these frames
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0
