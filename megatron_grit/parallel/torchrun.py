"""torchrun, with a line in place of its page where a process has failed: ``python -m megatron_grit.parallel.torchrun``.

It takes torchrun's options. A process that fails says so itself (:mod:`~megatron_grit.parallel.failures`); torchrun
would add the traceback of its own functions and a table. What a process cannot say, that a signal ended it, is said
here. The exit status is that of the process that failed first: 2 for what a user can repair. ``MEGATRON_GRIT_DEBUG=1``
keeps torchrun's own messages.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_grit.errors import ConfigError
from megatron_grit.parallel.failures import guarded

PROG = "torchrun"


def run(argv: Sequence[str] | None) -> int:
    """Start the processes and wait for them. Returns the exit status.

    Args:
        argv: torchrun's command line, without the program. None: that of the process.

    Raises:
        ConfigError: options that torchrun does not take together, or nodes that do not meet.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, with a warning
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as launch

    if os.environ.get("MEGATRON_GRIT_DEBUG") != "1":
        _silence()
    try:
        launch(parse_args(argv))
    except ChildFailedError as error:
        return _status_of(*_first_failure(error.failures))
    except SignalException as error:
        print(f"{PROG}: ended by {signal.Signals(error.sigval).name}", file=sys.stderr)
        return 128 + int(error.sigval)
    except RendezvousError as error:
        raise ConfigError(f"the nodes did not meet: {' '.join(str(error).split())}; look at --rdzv-endpoint") from error
    except (ValueError, AssertionError) as error:  # of options that do not go together
        raise ConfigError(" ".join(str(error).split())) from error
    return 0


def _silence() -> None:
    """Drop what the launcher logs of processes that end; each of its modules has a logger with a level of its own."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _first_failure(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The rank that failed first, and how.

    A rank whose error another rank has as well waits for that one to say it
    (:func:`~megatron_grit.parallel.failures.tell`), and is ended by the launcher meanwhile: its own error may be the
    older one, yet the status is that of the rank that spoke. A rank that somebody else ends by SIGTERM has no error.
    """

    def order(rank: int) -> tuple[bool, int]:
        failure = failures[rank]
        has_waited = failure.exitcode == -signal.SIGTERM and os.path.isfile(failure.error_file)
        return has_waited, failure.timestamp

    first = min(failures, key=order)
    return first, failures[first]


def _status_of(rank: int, failure: Any) -> int:
    """The status of the first process that failed; says how it ended where it could not say it."""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; the kernel kills so where memory is short: dmesg | grep -i oom" * (name == "SIGKILL")
        print(f"{PROG}: error: rank {rank} (process {failure.pid}) was ended by {name}{hint}", file=sys.stderr)
        return 128 - int(failure.exitcode)
    if not os.path.isfile(failure.error_file):
        how = f"ended with status {failure.exitcode}"
        print(f"{PROG}: error: rank {rank} (process {failure.pid}) {how}; see what it printed above", file=sys.stderr)
    return int(failure.exitcode)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job as torchrun does. Returns the exit status."""
    status = [0]

    def step() -> None:
        status[0] = run(argv)

    return guarded(step, PROG, joins_job=True) or status[0]


if __name__ == "__main__":
    sys.exit(main())
