"""A key-value store for the processes of this attempt alone.

torchrun keeps one store over its restarts, in jobs of one node at least. There the addresses of processes that are
gone answer for the new ones: gloo then fails with "connection refused", and NCCL waits for its time limit. A name made
of the restart count would not do, for the launchers of several nodes count differently.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_grit.errors import ConfigError, JobError
from megatron_grit.store.progress import still_at_work

_SECONDS_FOR_A_NAME = 10.0
_SECONDS_OF_SILENCE = 10.0
_SECONDS_BETWEEN_LOOKS = 0.02


def join_job(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Meet the other processes that the launcher started together with this one.

    Args:
        timeout: to wait for them.

    Returns:
        A store that no earlier attempt wrote to, this process's rank, the number of processes.

    Raises:
        JobError: not all processes came.
        ConfigError: the address is none, or its port is taken.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _check_address(address)
    others = f"{os.environ['WORLD_SIZE']} processes of the job, at MASTER_ADDR {address}, MASTER_PORT {port}"
    try:
        with still_at_work(f"waiting for the {others}", first=_SECONDS_OF_SILENCE):
            store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(_taken(port)) from None
        raise JobError(f"did not meet the {others}: {str(error).strip().partition(chr(10))[0]}") from None
    name = agree_on_name(store, rank, world_size, timeout.total_seconds())
    return dist.PrefixStore(name, store), rank, world_size


def port_errors() -> list[ConfigError]:
    """Whether rank 0 would find the job's port taken, where it is to run on this node and no launcher holds the port
    for it."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return []
    if not (port.isdecimal() and port.isascii() and 0 < int(port[:9]) < 65536):
        return [ConfigError(f"MASTER_PORT must be an integer from 1 to 65535, not {port!r}")]
    try:
        found = socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []  # perhaps an address that the nodes of the job know
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:  # an address of another node cannot be bound either
                if error.errno == errno.EADDRINUSE:
                    return [ConfigError(_taken(port))]
    return []


def _taken(port: str) -> str:
    return f"MASTER_PORT {port} is taken on this node; choose another one"


def _check_address(address: str) -> None:
    """Where processes start together with the network's names, a name may take some seconds to appear."""
    deadline = time.monotonic() + _SECONDS_FOR_A_NAME
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"MASTER_ADDR {address!r} is no address that this node knows ({error})") from None
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def agree_on_name(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """A name that is new and the same on all ranks, from a store that may hold what earlier attempts left in it.

    Every rank shows a token of its own. Rank 0 answers each token that it sees, and goes on until all ranks have said
    under the new name that they got their answer; answers to tokens of the dead are read by nobody.

    Raises:
        JobError: not all ranks came within ``seconds``.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        answered: set[bytes] = set()
        others = range(1, world_size)
        while others and not store.check([f"{token}/{other}" for other in others]):
            for other in others:
                shown = store.get(f"token/{other}") if store.check([f"token/{other}"]) else b""
                if shown and shown not in answered:
                    store.set(f"name_for/{shown.decode()}", token)
                    answered.add(shown)
            _wait(deadline, seconds, "for the other ranks")
        return token
    store.set(f"token/{rank}", token)
    while not store.check([f"name_for/{token}"]):
        _wait(deadline, seconds, "for rank 0")
    name = store.get(f"name_for/{token}").decode()
    store.set(f"{name}/{rank}", "")
    return name


def _wait(deadline: float, seconds: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise JobError(f"waited {seconds:.0f} s {whom} to start; see what the launcher printed on the other nodes")
    time.sleep(_SECONDS_BETWEEN_LOOKS)
