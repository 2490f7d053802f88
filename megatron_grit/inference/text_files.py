"""Embeds the lines of a file or of standard input into a .npy file, block by block; a killed run resumes."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit import compat
from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.data.text.lines import Line, read_lines
from megatron_grit.errors import DataError
from megatron_grit.inference.messages import EMPTY_TEXT
from megatron_grit.store.digest import digest_of_files
from megatron_grit.store.files import check_output, check_room
from megatron_grit.store.logs import get_logger, say_loading
from megatron_grit.store.progress import Progress
from megatron_grit.store.rows import RowFile

log = get_logger(__name__)

BLOCK = 2048
"""Texts that are embedded together: what a kill loses at most. Rows of a forward pass hold texts of one block, so the
last bits of vectors follow from it."""
_PROGRESS_FROM = 256
_STDIN = Path("<stdin>")


@dataclass(frozen=True)
class TextFile:
    """One text a line.

    Args:
        path: the file.
        shown: its name in errors.
    """

    path: Path
    shown: Path

    def lines(self) -> Iterator[Line]:
        """The lines in order; memory does not depend on their number."""
        return (line._replace(path=self.shown) for line in read_lines(self.path))

    def survey(self) -> tuple[int, str]:
        """Number and SHA-256 of the texts.

        Raises:
            DataError: an empty line, one that is no text, or no lines.
        """
        count, digest = 0, hashlib.sha256()
        for line in self.lines():
            if not line.text().strip():
                raise line.error(EMPTY_TEXT)
            digest.update(line.text().encode() + b"\n")
            count += 1
        if not count:
            raise DataError("holds no text; give one text a line", path=self.shown)
        return count, digest.hexdigest()


def encode_file(
    checkpoint: str | Path, input_path: str, output_path: str | Path, *, device: str = "auto", **options: Any
) -> np.ndarray:
    """Embed each line of a file. A killed run resumes where the model, the lines and the options are the same.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        input_path: text file with one text a line, plain, ``.gz`` or ``.zst``; or "-" for standard input.
        output_path: .npy file, float32 [number of lines, embedding size]; replaced when the new one is whole.
        options: instruction, side, max_length, batch_tokens of :meth:`GritModel.encode`.

    Returns:
        The embeddings, mapped.

    Raises:
        GritError: input, instruction or checkpoint that cannot be used, an output that is input or cannot be written,
            or too little room for it.
    """
    check_output(output_path, [] if input_path == "-" else [input_path])
    with RowFile(Path(output_path)) as output:
        source = _spooled(output.folder) if input_path == "-" else TextFile(Path(input_path), Path(input_path))
        count, digest = source.survey()  # before the model: a bad line is found at once
        path = resolve_checkpoint(checkpoint)
        say_loading()
        from megatron_grit.inference.encode import embedding_width
        from megatron_grit.inference.model import GritModel

        model = GritModel.load(path, device=device)
        output.resume([BLOCK, digest, model_identity(path, model), options], count)
        check_room(output_path, 4 * embedding_width(model.model) * (count - output.num_rows))
        if output.num_rows:
            log.info(f"{output_path}: resumes after {output.num_rows:,} of {count:,} texts")
        with Progress(count, "encoding", "text", enabled=count >= _PROGRESS_FROM) as bar:
            bar.skip(output.num_rows)
            texts = islice((line.text() for line in source.lines()), output.num_rows, count)
            while block := list(islice(texts, BLOCK)):
                output.append(model.encode(block, progress=False, **options))
                bar.update(len(block))
        if model.num_cut:
            log.info(f"{model.num_cut:,} texts are longer than max_length, or than the model's positions: cut")
        if source.survey() != (count, digest):
            raise DataError("changed while it was being read; start again when it is complete", path=source.shown)
        output.publish()
    return np.load(output_path, mmap_mode="r", allow_pickle=False)


def _spooled(folder: Path) -> TextFile:
    """Standard input as a file, which can be read again."""
    path = folder / "input.txt"
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return TextFile(path, _STDIN)


def model_identity(path: Path, model: Any) -> list[Any]:
    """What results follow from besides the texts and the options: the checkpoint's content, precision, versions."""
    manifest = path / "manifest.json"  # holds the checksums of all the other files
    files = [manifest] if manifest.is_file() else path.rglob("*")
    context = model.model.context
    return [
        digest_of_files(path, files, model.config.training.precision),
        context.device.type,
        compat.installed_versions(),
    ]
