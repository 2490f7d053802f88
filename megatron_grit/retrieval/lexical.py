"""BM25 over the chunks of a database (Robertson and Zaragoza, 2009), by bm25s: the words beside the vectors.

The index follows from the chunks and their tokenizer alone. It is made when it is first asked for, and kept in
``lexical/`` of the project directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.compat import needed
from megatron_grit.data.chunks.versions import VersionedDb
from megatron_grit.errors import DataError
from megatron_grit.retrieval.index.search import Found
from megatron_grit.store.content import content_digest
from megatron_grit.store.digest import describe_file, digest_of_settings
from megatron_grit.store.folder import OutputFolder
from megatron_grit.store.progress import Progress
from megatron_grit.store.sealed import read_sealed, write_sealed

_AT_A_TIME = 4096
_FILES = "files.json"


class LexicalIndex:
    """Words of a version's chunks.

    Args:
        db: the version.

    Raises:
        ConfigError: bm25s is not installed.
        DataError: a file of the index was changed.
    """

    def __init__(self, db: VersionedDb) -> None:
        with needed("a search by words needs", "bm25s", "retro"):
            import bm25s
        self._bm25s, self._db = bm25s, db
        # Removed documents are left out when it is searched; a removal makes no other index.
        identity = {"chunks": db.version.chunks, "tokenizer": db.project.tokenizer.fingerprint, "bm25s": 1}
        folder = db.project.folder / "lexical" / digest_of_settings(identity)[:16]
        if not folder.is_dir():
            with OutputFolder(folder, identity) as output:
                self._build(output.path)
                output.publish()
        self._index = self._open(folder)

    def _build(self, folder: Path) -> None:
        index = self._bm25s.BM25(backend="numpy")
        index.index(self._words(self._texts()), show_progress=False)
        index.save(str(folder), show_progress=False)
        write_sealed(folder / _FILES, {path.name: describe_file(path) for path in sorted(folder.iterdir())})

    def _open(self, folder: Path) -> Any:
        try:
            files = read_sealed(folder / _FILES)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"cannot be read ({error}); delete its folder, and it is made again", path=folder / _FILES
            ) from None
        for name, entry in files.items():
            path = folder / name
            if not path.is_file() or content_digest(path) != entry["sha256"]:
                raise DataError("was changed; delete its folder, and it is made again", path=folder / name)
        return self._bm25s.BM25.load(str(folder), mmap=True)

    def _texts(self) -> Iterator[str]:
        with Progress(len(self._db), "words of chunks", "chunk") as progress:
            for start in range(0, len(self._db), _AT_A_TIME):
                chunks = range(start, min(start + _AT_A_TIME, len(self._db)))
                yield from self._db.texts(chunks)
                progress.update(len(chunks))

    def _words(self, texts: Sequence[str] | Iterator[str]) -> Any:
        return self._bm25s.tokenize(list(texts), stopwords=None, show_progress=False)

    def search(self, texts: Sequence[str], k: int, excluded: np.ndarray) -> Found:
        """The chunks with most of a text's words; only those that have one.

        Args:
            texts: what is searched for.
            k: chunks of each.
            excluded: ids of chunks that are not found.
        """
        words = self._bm25s.tokenize(list(texts), stopwords=None, show_progress=False, return_ids=False)
        scores, ids = np.zeros((len(texts), k), np.float32), np.full((len(texts), k), -1, np.int64)
        for row, query in enumerate(words):
            known = self._index.get_tokens_ids(query)
            if len(known):
                found = np.array(self._index.get_scores_from_ids(known))
                found[excluded] = 0
                # Of equal scores the smaller id comes first, as in a search of vectors.
                best = np.argsort(-found, kind="stable")[:k]
                best = best[found[best] > 0]
                ids[row, : len(best)], scores[row, : len(best)] = best, found[best]
        return scores, ids


def fuse(rankings: Sequence[np.ndarray], k: int, constant: int = 60) -> Found:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009): the sum of 1 / (constant + rank) of each id.

    Args:
        rankings: int64 [Q, K] each, best first, -1 for none.
        k: ids of each row.
        constant: the larger, the less the first ranks count.
    """
    scores, ids = np.zeros((len(rankings[0]), k), np.float32), np.full((len(rankings[0]), k), -1, np.int64)
    for row in range(len(ids)):
        sums: dict[int, float] = {}
        for ranking in rankings:
            for rank, number in enumerate(ranking[row][ranking[row] >= 0].tolist(), start=1):
                sums[number] = sums.get(number, 0.0) + 1 / (constant + rank)
        best = sorted(sums, key=lambda number: (-sums[number], number))[:k]
        ids[row, : len(best)], scores[row, : len(best)] = best, [sums[number] for number in best]
    return scores, ids
