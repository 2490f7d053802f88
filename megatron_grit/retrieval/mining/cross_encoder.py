"""Scores of (query, passage) pairs by a model that reads both at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_grit.data.text.lines import filled_lines
from megatron_grit.errors import ConfigError, DataError, NumericsError
from megatron_grit.store.digest import sha256_of_file


class PairScorer(Protocol):
    """Relevance of passages to queries."""

    fingerprint: str
    """Of everything that a score follows from."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores of (query, passage) pairs, float64 [n]; NaN where there is none."""
        ...


def load_scorer(path: Path, max_length: int = 512) -> PairScorer:
    """A Hugging Face cross-encoder's directory, or a JSONL file of scores.

    Raises:
        ConfigError: neither of them.
        DataError: a file that cannot be read.
    """
    if (path / "config.json").is_file():
        return CrossEncoder(path, max_length)
    if path.is_file():
        return ScoreFile(path)
    raise ConfigError(f"cross_encoder {path}: neither the directory of a Hugging Face model nor a file of scores")


class ScoreFile:
    """Scores that were made elsewhere: one ``{"query": ..., "passage": ..., "score": ...}`` a line."""

    def __init__(self, path: Path) -> None:
        self.fingerprint = sha256_of_file(path)
        self._scores: dict[tuple[str, str], float] = {}
        for line in filled_lines(path):
            value = line.value()
            try:
                self._scores[str(value["query"]), str(value["passage"])] = float(value["score"])
            except (ValueError, TypeError, KeyError) as error:
                raise line.error(f'needs "query", "passage" and "score" in each line ({error!r})') from None

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        return np.array([self._scores.get(pair, np.nan) for pair in pairs], dtype=np.float64)


class CrossEncoder:
    """A sequence classifier of transformers with one output.

    Raises:
        ConfigError: one with more outputs, or transformers is missing.
        DataError: files that cannot be read, or that lack weights or the model's tokenizer.
    """

    def __init__(self, folder: Path, max_length: int, batch_size: int = 64) -> None:
        try:
            import torch
            from safetensors import SafetensorError
            from transformers import AutoModelForSequenceClassification
        except ImportError as error:
            raise ConfigError(f"a cross-encoder of Hugging Face needs the package {error.name}") from None
        from megatron_grit.inference.encoders.hugging_face import check_vocabulary, load_tokenizer, quiet, reason_of

        self._torch, self._max_length, self._batch_size = torch, max_length, batch_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = load_tokenizer(folder)
        try:
            with quiet():
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    str(folder),
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise DataError(
                f"holds no cross-encoder that transformers reads ({reason_of(error)})", path=folder
            ) from None
        if report["missing_keys"] or report["mismatched_keys"]:
            name = next(iter([*report["missing_keys"], *report["mismatched_keys"]]))
            raise DataError(f"its weights are not those of a cross-encoder: {name} is missing or another", path=folder)
        check_vocabulary(folder, self._tokenizer, model)
        if model.config.num_labels != 1:
            raise ConfigError(f"cross_encoder {folder}: has {model.config.num_labels} outputs; one score is needed")
        self._model = model.to(self._device).eval()
        digest = hashlib.sha256(str(max_length).encode())
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        self.fingerprint = digest.hexdigest()

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """As :class:`PairScorer` says; pairs of like length share a batch.

        Raises:
            NumericsError: a score is not finite.
        """
        torch = self._torch
        out = np.empty(len(pairs), dtype=np.float64)
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            texts = [list(side) for side in zip(*(pairs[number] for number in batch), strict=True)]
            inputs = self._tokenizer(
                *texts, truncation="longest_first", max_length=self._max_length, padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self._model(**inputs.to(self._device)).logits
            out[batch] = logits[:, 0].double().cpu().numpy()
        if not np.isfinite(out).all():
            raise NumericsError("a score of the cross-encoder is not finite")
        return out
