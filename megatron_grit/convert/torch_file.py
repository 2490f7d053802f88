"""Files that torch wrote, read without running code of theirs: the only place where pickled weights are read.

Such a file is pickle, which can run code when it is read. ``torch.load(weights_only=True)`` makes tensors, numbers and
plain containers of it and refuses all else. A file that holds objects of other classes is read where the caller has
stand-ins for them: no code of a file or of its classes runs.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_grit.errors import CheckpointError

_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch before 1.6 begins a file: a number, pickled."""


def read_torch_file(
    file: Path, content: str, remedy: str, stand_in: Callable[[str], type] | None = None
) -> dict[Any, Any]:
    """The dict in a file, its tensors mapped; in memory where the file is one of torch before 1.6.

    Args:
        file: where it is.
        content: what the file should hold, for messages.
        remedy: what to do about a file that holds something else.
        stand_in: the class that takes the place of one, by its name. None: there are tensors and nothing else.

    Raises:
        CheckpointError: it is damaged, holds something that would run code, or no dict; or it is of torch before 1.6
            and there may be objects in it.
    """
    try:
        is_zip = zipfile.is_zipfile(file)
        known: list[Any] = []
        if stand_in is not None:
            if not is_zip and _is_old(file):
                raise CheckpointError(
                    f"{file}: is of torch before 1.6, which is read only where it holds tensors and nothing else; load "
                    "and save it once with a newer torch that you trust it with"
                )
            known = [(stand_in(name), name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)]
        with torch.serialization.safe_globals(known):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails in whatever way its bytes lead to
        if type(error).__name__ == "UnpicklingError":
            raise CheckpointError(
                f"{file}: holds something else than {content}, which would run code when it is read; nothing of it was "
                f"run. {remedy}"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{file}: not a whole file of torch ({reason}); copy it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: not a state dict, but {type(found).__name__}; give a file that holds {content}")
    return found


def _is_old(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_OLD)) == _OLD
