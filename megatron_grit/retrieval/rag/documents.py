"""Texts of files of several kinds: plain text, Markdown, HTML and JSONL."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from megatron_grit.config.values import shortened
from megatron_grit.data.text.lines import filled_lines, read_lines
from megatron_grit.errors import DataError
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_KINDS = {".text": ".txt", ".markdown": ".md", ".htm": ".html"} | {
    kind: kind for kind in (".txt", ".md", ".html", ".jsonl")
}
"""What a file is read as, by its suffix."""
_PACKED = (".gz", ".zst")
_HEADING = re.compile(r"\s{0,3}#{1,6}\s+(.+?)\s*#*\s*")


class Document(NamedTuple):
    """A text and where it is from."""

    text: str
    source: str
    """Path below the folder that was given, with the id or number of its line where there are several."""
    title: str


def find_files(given: Sequence[str | os.PathLike[str]]) -> list[tuple[Path, str]]:
    """Files to read, and what each is called: its name, or its path below the folder that was given.

    Hidden ones are passed over, and of folders those of other kinds, which are counted in the log.

    Raises:
        DataError: no such path, a file of another kind, or none at all.
    """
    found: dict[Path, str] = {}
    others: Counter[str] = Counter()
    for path in map(Path, given):
        if path.is_file():
            if _kind(path) is None:
                raise DataError("is of no kind that is read; give .txt, .md, .html or .jsonl", path=path)
            found.setdefault(path.resolve(), path.name)
        elif path.is_dir():
            for file in _below(path):
                if _kind(file) is None:
                    others[file.suffix or file.name] += 1
                else:
                    found.setdefault(file.resolve(), file.relative_to(path).as_posix())
        else:
            raise DataError("is not there", path=path)
    if others:
        told = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(5))
        log.info(f"{sum(others.values())} files of other kinds are not read: {told}")
    if not found:
        raise DataError("holds no .txt, .md, .html or .jsonl file", path=Path(given[0]))
    return list(found.items())


def read_documents(files: Sequence[tuple[Path, str]], text_key: str = "text") -> Iterator[Document]:
    """Documents of files, in their order; those without a word are passed over.

    Args:
        files: of :func:`find_files`.
        text_key: of a JSONL line: where its text is.

    Raises:
        DataError: a file is no UTF-8 text, or a line no object with a text; names the line.
    """
    for path, name in files:
        kind = _kind(path)
        several = _of_lines(path, name, text_key) if kind == ".jsonl" else [_of_file(path, name, kind)]
        yield from (document for document in several if document.text.strip())


def html_text(html: str) -> tuple[str, str]:
    """The text that a page shows, a line for each block, and its title."""
    reader = _Page()
    reader.feed(html)
    reader.close()
    lines = (" ".join(line.split()) for line in "".join(reader.parts).split("\n"))
    return "\n".join(line for line in lines if line), " ".join("".join(reader.title).split())


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _kind(path: Path) -> str | None:
    """What a file is read as. None: it is not read."""
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return _KINDS.get(Path(name).suffix)


def _of_file(path: Path, name: str, kind: str | None) -> Document:
    text = "\n".join(line.text() for line in read_lines(path))
    title = ""
    if kind == ".html":
        text, title = html_text(text)
    elif kind == ".md":
        heading = next(filter(None, map(_HEADING.fullmatch, text.split("\n"))), None)
        title = heading[1] if heading else ""
    return Document(text, name, title or Path(name).stem)


def _of_lines(path: Path, name: str, text_key: str) -> Iterator[Document]:
    for line in filled_lines(path):
        value = line.value()
        if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
            raise line.error(f'must be an object with a text under "{text_key}", not {shortened(value)}')
        number = next((str(value[key]) for key in ("id", "_id") if value.get(key) is not None), str(line.number))
        yield Document(value[text_key], f"{name}:{number}", str(value.get("title") or ""))


class _Page(HTMLParser):
    """Collects what a page shows."""

    UNSEEN = frozenset({"script", "style", "noscript", "template", "svg", "head", "iframe", "object", "select"})
    INLINE = frozenset(
        "a abbr b bdi bdo cite code data dfn em font i ins kbd label mark q s samp small span strong sub sup time u "
        "var wbr del".split()
    )
    EMPTY = frozenset("area base br col embed hr img input link meta source track wbr".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title: list[str] = []
        self._unseen: list[str] = []
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":  # a head that nobody closed
            self._unseen.clear()
        if tag == "title" and "svg" not in self._unseen:
            self._in_title = True
        elif tag in self.UNSEEN and tag not in self.EMPTY:
            self._unseen.append(tag)
        elif tag not in self.INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag in self._unseen:
            while self._unseen.pop() != tag:
                pass
        elif tag not in self.INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title.append(data)
        elif not self._unseen:
            # A line break in the file is a space on the page.
            self.parts.append(data.replace("\n", " "))
