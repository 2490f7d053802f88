"""Splits texts into sentences with NLTK's Punkt, whose parameters are trained on the corpus or given, not downloaded.

Punkt (Kiss and Strunk, Unsupervised Multilingual Sentence Boundary Detection, 2006) learns from plain text which words
are abbreviations, which pairs of words belong together across a period, and which words begin sentences. What it has
learnt is kept as JSON. NLTK's own parameters can be read from its ``punkt_tab`` folders; its pickles are never opened.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_grit.compat import needed
from megatron_grit.errors import ConfigError, DataError

PUNKT_FORMAT = "megatron_grit.punkt"
PUNKT_VERSION = 1
_TAB_FILES = ("abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab")


@dataclass(frozen=True, kw_only=True)
class PunktModel:
    """Punkt's parameters."""

    abbreviations: list[str]
    """Without the final period, in lower case; sorted."""
    collocations: list[list[str]]
    """Pairs of words of which the first ends with a period that ends no sentence; sorted."""
    sentence_starters: list[str]
    """Words that often begin a sentence; sorted."""
    orthographic_context: dict[str, int]
    """Of each word, in which positions it was seen with and without a capital: NLTK's bits."""
    trained_on: dict[str, Any] = field(default_factory=dict)
    """What the parameters were trained on; empty where they were read from NLTK."""

    def to_json(self) -> str:
        """Text of the file."""
        return json.dumps({"format": PUNKT_FORMAT, "version": PUNKT_VERSION, **asdict(self)}, ensure_ascii=False) + "\n"


class _Contexts(defaultdict[str, int]):
    """NLTK looks words up in a defaultdict, which would keep every word of the corpus."""

    def __missing__(self, key: str) -> int:
        return 0


class SentenceSplitter:
    """Splits texts into sentences.

    Args:
        model: Punkt's parameters.
        keep_newlines: leave the white space after a sentence with it, so that the sentences of a text, one after
            another, are the text. Without it white space between sentences is lost.

    Raises:
        ConfigError: NLTK is not installed.
    """

    def __init__(self, model: PunktModel, *, keep_newlines: bool = False) -> None:
        punkt = _import_punkt()
        parameters = punkt.PunktParameters()
        parameters.abbrev_types = set(model.abbreviations)
        parameters.collocations = {(first, second) for first, second in model.collocations}
        parameters.sent_starters = set(model.sentence_starters)
        parameters.ortho_context = _Contexts(int, model.orthographic_context)
        self._punkt = punkt.PunktSentenceTokenizer(parameters)
        self._keep_newlines = keep_newlines

    def split(self, text: str) -> list[str]:
        """Sentences of ``text``, at least one unless it is empty."""
        if not text:
            return []
        spans = list(self._punkt.span_tokenize(text))
        if not self._keep_newlines:
            return [text[start:stop] for start, stop in spans]
        cuts = [0, *(start for start, _ in spans[1:]), len(text)]
        return [text[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]


def train_punkt(texts: Iterable[str], trained_on: dict[str, Any] | None = None) -> PunktModel:
    """Train Punkt. The same texts in the same order give the same model.

    Args:
        texts: plain text.
        trained_on: what to note about them in the model.

    Raises:
        ConfigError: NLTK is not installed.
        DataError: no text.
    """
    trainer = _import_punkt().PunktTrainer()
    empty = True
    for text in texts:
        trainer.train(text, finalize=False)
        empty = False
    if empty:
        raise DataError("no text to train the sentence splitter on")
    trainer.finalize_training()
    parameters = trainer.get_params()
    return _model_of(
        parameters.abbrev_types,
        parameters.collocations,
        parameters.sent_starters,
        parameters.ortho_context,
        trained_on or {},
    )


def load_punkt(path: str | os.PathLike[str]) -> PunktModel:
    """Read Punkt's parameters.

    Args:
        path: a JSON file as :meth:`PunktModel.to_json` writes it, or a folder of NLTK's ``punkt_tab`` for one language.

    Raises:
        DataError: neither of them.
    """
    path = Path(path)
    if path.is_dir():
        return _load_tab(path)
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"the Punkt model cannot be read: {error.strerror}", path=path) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a Punkt model in JSON: {error}; NLTK's pickles are not read", path=path) from error
    if not isinstance(values, dict) or values.pop("format", None) != PUNKT_FORMAT:
        raise DataError(f"not a Punkt model (format is not {PUNKT_FORMAT})", path=path)
    version = values.pop("version", None)
    if version != PUNKT_VERSION:
        raise DataError(f"version {version} of a Punkt model, this is {PUNKT_VERSION}; train it again", path=path)
    try:
        model = PunktModel(**values)
        [(first, second) for first, second in model.collocations]
    except (TypeError, ValueError) as error:
        raise DataError(f"incomplete Punkt model: {error}; train it again", path=path) from error
    return model


def find_language(language: str) -> Path:
    """The folder of NLTK's own parameters for a language, below one of the folders in ``NLTK_DATA`` or NLTK's own.

    Raises:
        ConfigError: NLTK is not installed, or has no such folder.
    """
    _import_punkt()
    import nltk.data

    for root in nltk.data.path:
        folder = Path(root) / "tokenizers" / "punkt_tab" / language
        if all((folder / name).is_file() for name in _TAB_FILES):
            return folder
    raise ConfigError(
        f"NLTK has no Punkt parameters for {language!r}: unpack its punkt_tab package below NLTK_DATA, "
        "give --punkt-model, or leave --lang out to train on the corpus"
    )


def _load_tab(folder: Path) -> PunktModel:
    lines: dict[str, list[list[str]]] = {}
    for name in _TAB_FILES:
        try:
            content = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"not a punkt_tab folder of one language: {error}", path=folder / name) from error
        lines[name] = [line.split("\t") for line in content.splitlines() if line]
    abbreviations, collocations, starters, contexts = (lines[name] for name in _TAB_FILES)
    try:
        return _model_of(
            {word for (word,) in abbreviations},
            {(first, second) for first, second in collocations},
            {word for (word,) in starters},
            {word: int(bits) for word, bits in contexts},
            {},
        )
    except ValueError as error:
        raise DataError(f"not a punkt_tab folder of one language: {error}", path=folder) from error


def _model_of(
    abbreviations: set[str],
    collocations: set[tuple[str, str]],
    starters: set[str],
    contexts: dict[str, int],
    trained_on: dict[str, Any],
) -> PunktModel:
    return PunktModel(
        abbreviations=sorted(abbreviations),
        collocations=[list(pair) for pair in sorted(collocations)],
        sentence_starters=sorted(starters),
        orthographic_context={word: contexts[word] for word in sorted(contexts) if contexts[word]},
        trained_on=trained_on,
    )


def _import_punkt() -> Any:
    with needed("splitting sentences needs", "nltk", "data"):
        from nltk.tokenize import punkt
    return punkt
