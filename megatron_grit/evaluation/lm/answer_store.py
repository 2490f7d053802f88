"""Answers to requests on disk, so that a killed evaluation resumes, and tasks that share requests share their answers.

A folder holds ``model.json``, which says whose answers they are, and files of lines ``{"request": SHA-256, "answer":
...}``, one for each list of requests that was asked together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_grit.errors import DataError
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import json_text, write_json
from megatron_grit.store.lock import locked
from megatron_grit.store.rows import LineFile

Request = list[Any]
"""What JSON can hold: all that an answer follows from, besides the model."""
Answers = Iterator[tuple[Sequence[int], list[Any]]]
"""Numbers of requests, and their answers, some at a time."""


class AnswerStore:
    """The answers of one model.

    Args:
        folder: made if missing.
        identity: of the model and of what its answers follow from, by names that a message can say.

    Raises:
        DataError: the folder holds answers of another model.
        OutputError: it cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._folder, self._identity = folder, identity
        with locked(folder / "lock", folder):
            self._check(folder / "model.json")
        self._known: dict[str, Any] = {}
        for path in sorted(folder.glob("*.jsonl")):
            self._known |= {entry["request"]: entry["answer"] for entry in _entries(path)}

    def _check(self, path: Path) -> None:
        if not path.is_file():
            return write_json(path, self._identity)
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read ({error}); give another folder", path=path) from None
        held = found if isinstance(found, dict) else {}
        other = [name for name, value in self._identity.items() if held.get(name) != value]
        if other:
            what = ", ".join(f"{name} {str(held.get(name))[:60]}" for name in other)
            raise DataError(f"the answers here are of another model ({what}); give another --output-dir", path=path)

    def complete(self, kind: str, requests: Sequence[Request], ask: Callable[[list[int]], Answers]) -> list[Any]:
        """Answers of all requests: those on disk, and of the others what the model says, written as it comes.

        Args:
            kind: of requests, for the file's name.
            requests: in any order; equal ones are asked once.
            ask: yields the answers of requests, by their numbers, in any order.
        """
        keys = [digest_of_settings([kind, request]) for request in requests]
        missing = {key: number for number, key in reversed(list(enumerate(keys))) if key not in self._known}
        ordered = dict(sorted(missing.items(), key=lambda entry: entry[1]))
        if not ordered:
            return [self._known[key] for key in keys]
        asked = digest_of_settings(list(ordered))
        with LineFile(self._folder / f"{kind}-{asked[:12]}.jsonl") as file:
            file.resume([self._identity, asked], len(ordered))
            for line in file.lines():
                entry = json.loads(line)
                self._known[entry["request"]] = entry["answer"]
            for numbers, answers in ask([number for key, number in ordered.items() if key not in self._known]):
                lines = []
                for number, answer in zip(numbers, answers, strict=True):
                    self._known[keys[number]] = answer
                    lines.append(json_text({"request": keys[number], "answer": answer}))
                file.append(lines)
            file.publish()
        return [self._known[key] for key in keys]


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                entry["request"], entry["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"is damaged ({error!r}); remove the file", path=path, line=number) from None
            yield entry
