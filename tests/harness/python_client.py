"""Stands for the Python interpreter in tests: hands a command to the process that has the engine loaded.

Started as ``python_client.py SOCKET PYTHON ARGUMENT...``. A program of the project, or torchrun, is run by a fork of
the server (tests/harness/command.py) with this process's arguments, directory, variables and open files; signals are
passed on, and the exit status is its own. Whatever else is wanted of Python, PYTHON does. This file imports little: it
is started for every command.
"""

import os
import signal
import socket
import sys

PROGRAMS = ("megatron_grit", "benchmarks", "tools", "torch.distributed.run")
WITH_VALUE = ("-W", "-X")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)


def is_ours(arguments):
    """Whether the server runs it: ``-m`` with one of our modules, or a script."""
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "-m":
            return bool(rest) and any(rest[0] == name or rest[0].startswith(name + ".") for name in PROGRAMS)
        if word in WITH_VALUE:
            rest = rest[1:]
        elif word != "-u":
            return False
    return bool(rest) and rest[0].endswith(".py")


def main():
    """Exit as the command does."""
    address, python, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
    if not is_ours(arguments):
        os.execv(python, [python, *arguments])
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = b"\0".join(
        [os.fsencode(os.getcwd()), str(len(arguments)).encode(), *map(os.fsencode, arguments)]
        + [key + b"=" + value for key, value in os.environb.items()]
    )
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
    with open(os.devnull) as null:
        files = [each if is_open(each) else null.fileno() for each in (0, 1, 2)]
        socket.send_fds(server, [len(request).to_bytes(8, "little")], files)
    server.sendall(request)
    answer = server.recv(16)
    if not answer:
        sys.stderr.write("python_client: the server is gone\n")
        os._exit(70)
    status = int(answer)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def is_open(file):
    """Whether a file descriptor is in use."""
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


main()
