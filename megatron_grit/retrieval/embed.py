"""What turns chunks into vectors, behind one protocol: an encoder of Hugging Face, or one of our own models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from megatron_grit.errors import ConfigError, DataError, NumericsError

if TYPE_CHECKING:
    from megatron_grit.inference.model import GritModel

Side = Literal["passage", "query"]


class Embedder(Protocol):
    """Texts to vectors."""

    dim: int
    """Channels of a vector."""
    fingerprint: str
    """Of everything that a vector follows from, weights included."""

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        """Vectors of texts, float32 [len(texts), dim], finite.

        Raises:
            NumericsError: a vector is not finite; names the text.
        """
        ...


def load_embedder(
    path: str,
    *,
    pooling: str = "auto",
    max_length: int = 256,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    query_instruction: str = "",
    device: str = "auto",
) -> Embedder:
    """The embedder that a directory holds.

    Args:
        path: a Hugging Face encoder, a sentence-transformers model, or a checkpoint or run of ours.
        pooling: of a Hugging Face encoder: mean, mean_text, cls, or auto for what its modules.json says.
        max_length: tokens to which a text is cut.
        batch_tokens: tokens of a forward pass.
        precision: fp32, or bf16 for the matrix products.
        query_instruction: what our own models embed queries for.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: the directory holds none of these.
    """
    folder = Path(path)
    if (folder / "state.json").is_file() or (folder / "checkpoints").is_dir():
        from megatron_grit.inference.model import GritModel

        model = GritModel.load(folder, device=device, precision=precision)
        return GritEmbedder(model, folder, max_length, batch_tokens, query_instruction)
    if (folder / "config.json").is_file():
        return HuggingFaceEmbedder(folder, pooling, max_length, batch_tokens, precision, device)
    raise ConfigError(
        f"embedder {path}: holds neither config.json of a Hugging Face encoder nor a checkpoint; give a local directory"
    )


class HuggingFaceEmbedder:
    """An encoder of transformers. Texts of like length share a batch, so that little is padding."""

    def __init__(
        self, folder: Path, pooling: str, max_length: int, batch_tokens: int, precision: str, device: str
    ) -> None:
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ConfigError(f"an encoder of Hugging Face needs the package {error.name}") from None
        self._torch = torch
        self.device = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        modules = _sentence_transformers_modules(folder)
        self.pooling = modules["pooling"] if pooling == "auto" else pooling
        self.normalize = modules["normalize"] if pooling == "auto" else False
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self._model = AutoModel.from_pretrained(str(folder), use_safetensors=True).to(self.device).eval()
        self.precision = precision
        longest = getattr(self._model.config, "max_position_embeddings", max_length)
        self.max_length, self.batch_tokens = min(max_length, longest), batch_tokens
        self.dim = int(self._model.config.hidden_size)
        files = [folder / name for name in ("config.json", "tokenizer.json", "vocab.txt")]
        settings = [self.pooling, self.normalize, self.max_length, precision]
        self.fingerprint = _digest([*files, *sorted(folder.glob("*.safetensors"))], settings)

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        torch = self._torch
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        if not len(texts):
            return out
        ids = self._tokenizer(list(texts), truncation=True, max_length=self.max_length, return_attention_mask=False)
        rows = [np.asarray(row, dtype=np.int64) for row in ids["input_ids"]]
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        place = 0
        while place < len(order):
            width = max(len(rows[order[place]]), 1)
            batch = order[place : place + max(1, self.batch_tokens // width)]
            place += len(batch)
            tokens = np.full((len(batch), width), self._tokenizer.pad_token_id or 0, dtype=np.int64)
            for row, number in enumerate(batch):
                tokens[row, : len(rows[number])] = rows[number]
            lengths = torch.tensor([len(rows[number]) for number in batch], device=self.device)
            out[batch] = self._forward(torch.from_numpy(tokens).to(self.device), lengths)
        return _finite(out, texts)

    def _forward(self, tokens_BT: Any, lengths_B: Any) -> np.ndarray:
        torch = self._torch
        positions = torch.arange(tokens_BT.shape[1], device=self.device)
        mask_BT = positions < lengths_B[:, None]
        bf16 = torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.inference_mode(), bf16:
            states_BTD = self._model(input_ids=tokens_BT, attention_mask=mask_BT.long()).last_hidden_state
        states_BTD = states_BTD.float()
        if self.pooling == "cls":
            pooled = states_BTD[:, 0]
        else:
            if self.pooling == "mean_text":
                # Retro's BERT: neither [CLS] nor [SEP]; a text without any token of its own keeps [CLS].
                inner = mask_BT & (positions > 0) & (positions < lengths_B[:, None] - 1)
                mask_BT = torch.where(inner.any(1, keepdim=True), inner, positions == 0)
            weights = mask_BT.float()[..., None]
            pooled = (states_BTD * weights).sum(1) / weights.sum(1)
        if self.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return np.asarray(pooled.cpu().numpy(), dtype=np.float32)


class GritEmbedder:
    """The bidirectional pass of one of our models."""

    def __init__(
        self, model: GritModel, folder: Path, max_length: int, batch_tokens: int, query_instruction: str
    ) -> None:
        from megatron_grit.training.checkpoint import resolve_checkpoint

        self._model, self._max_length, self._batch_tokens = model, max_length, batch_tokens
        self._query_instruction = query_instruction
        self.dim = model.config.embedding.projection_dim or model.config.model.hidden_size
        manifest = resolve_checkpoint(folder) / "manifest.json"
        precision = model.config.training.precision
        self.fingerprint = _digest([manifest], [max_length, query_instruction, precision])

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        if not len(texts):
            return np.empty((0, self.dim), dtype=np.float32)
        vectors = self._model.encode(
            list(texts),
            self._query_instruction if side == "query" else "",
            max_length=self._max_length,
            batch_tokens=self._batch_tokens,
            progress=False,
        )
        return _finite(vectors, texts)


def _finite(vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise NumericsError(f"{len(bad)} vectors are not finite; the first is of the text {texts[int(bad[0])][:80]!r}")
    return vectors


def _digest(files: Sequence[Path], settings: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in files:
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def _sentence_transformers_modules(folder: Path) -> dict[str, Any]:
    """Pooling and normalisation that ``modules.json`` says; those of Retro where there is none.

    Raises:
        ConfigError: modules that are not known here.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return {"pooling": "mean_text", "normalize": False}
    found: dict[str, Any] = {"pooling": "mean", "normalize": False}
    try:
        for module in json.loads(path.read_text(encoding="utf-8")):
            kind = module["type"].rpartition(".")[2]
            if kind == "Normalize":
                found["normalize"] = True
            elif kind == "Pooling":
                found["pooling"] = _pooling_mode(folder / module["path"] / "config.json")
            elif kind != "Transformer":
                raise ConfigError(f"{path}: module {kind} is not known here; known: Transformer, Pooling, Normalize")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot be read ({error})", path=path) from None
    return found


def _pooling_mode(path: Path) -> str:
    settings = json.loads(path.read_text(encoding="utf-8"))
    modes = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    chosen = settings.get("pooling_mode")
    if chosen in modes:
        return str(chosen)
    active = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    for name, key in modes.items():
        if active == [key]:
            return name
    raise ConfigError(f"{path}: pooling {active or chosen} is not known here; known: {', '.join(modes)}")
