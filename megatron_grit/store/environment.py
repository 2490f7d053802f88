"""Where this process is: its job, the one reader of RANK, WORLD_SIZE and their like, its host, and what addresses lead
back to it."""

from __future__ import annotations

import ipaddress
import os
import socket

from megatron_grit.errors import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_UNSET = "start the processes with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK to run one alone"


def job_rank() -> int:
    """Rank of this process; 0 where the variables are no job's."""
    return 0 if job_problem(meets=False) else int(os.environ.get("RANK") or 0)


def job_size() -> int:
    """Number of processes of the job; 1 where the variables are no job's."""
    return 1 if job_problem(meets=False) or not os.environ.get("RANK") else int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """Rank of this process on its node; 0 where the variables are no job's."""
    return 0 if job_problem(meets=False) else int(os.environ.get("LOCAL_RANK") or 0)


def local_size() -> int | None:
    """Processes that a job has on this node; None where the variables do not say so.

    Raises:
        ConfigError: LOCAL_WORLD_SIZE is no count.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE")
    if (problem := _number_problem("LOCAL_WORLD_SIZE", 1)) is not None:
        raise ConfigError(problem)
    return int(given) if given else 1 if planned_size() == 1 else None


def restart_line() -> str | None:
    """Which restart by the launcher this is, where it is one."""
    count, most = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if not (count.isdecimal() and most.isdecimal() and 0 < int(count) <= int(most)) or not os.environ.get("RANK"):
        return None
    return f"restart {count} of {most}"


def planned_size() -> int:
    """Number of processes that a command is checked for, WORLD_SIZE; RANK need not be set.

    Raises:
        ConfigError: it is no count.
    """
    problem = _number_problem("WORLD_SIZE", 1)
    if problem is not None:
        raise ConfigError(problem)
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_job(*, meets: bool = True) -> None:
    """Refuse variables that are not those of a job, which a process would wait for in vain.

    Raises:
        ConfigError: says which.
    """
    if (problem := job_problem(meets=meets)) is not None:
        raise ConfigError(f"{problem}; {_UNSET}")


def leave_job() -> str | None:
    """Drop variables that are not those of a job; what was wrong with them."""
    problem = job_problem()
    if problem is not None:
        for name in _VARIABLES:
            os.environ.pop(name, None)
    return problem


def job_problem(*, meets: bool = True) -> str | None:
    """Why the variables are not those of a job. None: they are, or there are none.

    ``meets``: the process has yet to meet the others, at MASTER_ADDR.
    """
    given = os.environ
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        if (problem := _number_problem(name, least)) is not None:
            return problem
    rank, size = int(given.get("RANK") or 0), int(given.get("WORLD_SIZE") or 1)
    if not given.get("RANK") and size > 1:
        return f"WORLD_SIZE is {size}, but RANK is not set"
    if rank >= size:
        return f"RANK is {rank}, but WORLD_SIZE is {size if given.get('WORLD_SIZE') else 'not set'}"
    if given.get("LOCAL_WORLD_SIZE") and int(given.get("LOCAL_RANK") or 0) >= int(given["LOCAL_WORLD_SIZE"]):
        return f"LOCAL_RANK is {given['LOCAL_RANK']}, but LOCAL_WORLD_SIZE is {given['LOCAL_WORLD_SIZE']}"
    if size == 1 or not meets:
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not given.get(name):
            return f"RANK is {rank} and WORLD_SIZE {size}, but {name} is not set"
    return _number_problem("MASTER_PORT", 1, 65535)


def _number_problem(name: str, least: int, most: int | None = None) -> str | None:
    text = os.environ.get(name) or str(least)
    if text.isdecimal() and text.isascii() and len(text) < 10 and least <= int(text) <= (most or int(text)):
        return None
    return f"{name} must be an integer {f'from {least} to {most}' if most else f'of at least {least}'}, not {text!r}"


def process_space() -> str:
    """A name that two processes share only where they see each other's process ids: host, its boot, namespace of ids.

    Where that cannot be told, each call gives another name, which no process shares.
    """
    name = socket.gethostname()
    try:
        # Namespaces have the same numbers on every host, and a name may be that of several hosts on one file system.
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        # /proc may be mounted for another namespace, where the ids are those of other processes.
        if boot and os.readlink("/proc/self") == str(os.getpid()):
            return f"{name} {boot} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, ValueError):
        pass
    return f"{name} {os.urandom(16).hex()}"


def is_alive(pid: int) -> bool:
    """Whether a process of this :func:`process_space` runs, be it stopped; one that ended and was not waited for does
    not. One of which that cannot be told counts as alive."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except (OSError, OverflowError, IndexError):  # of another user, hidden in /proc, or a number that is no id
        return True


def is_loopback(host: str) -> bool:
    """Whether an address, or localhost, is one at which a machine talks to itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
