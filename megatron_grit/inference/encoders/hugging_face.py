"""An encoder of Hugging Face as embedder: batches of texts of like length, pooled as its directory says.

Shape suffix legend: B = texts, T = tokens, D = channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_grit.convert.hf_in.sentence_modules import (
    Features,
    Pooling,
    SentenceModules,
    TextMean,
    read_modules,
)
from megatron_grit.data.text.markers import Side
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import EmbedderOptions, finite
from megatron_grit.inference.messages import check_texts
from megatron_grit.inference.model_group import ModelGroup
from megatron_grit.parallel.devices import select_device, warn_of_slow_bf16
from megatron_grit.store.digest import digest_of_files

_WINDOW = 8192
"""Texts that are tokenised and sorted at a time: memory does not grow with the number of texts, and the next window is
tokenised while the model computes this one."""
_READ_SUFFIXES = {".json", ".txt", ".model", ".safetensors", ".jinja", ".vocab", ".bpe"}
"""Of the files that an encoder or its tokenizer may read."""


class HuggingFaceEmbedder:
    """An encoder of transformers.

    Args:
        folder: of the encoder, or of a sentence-transformers model.
        options: how texts are embedded. ``pooling`` other than auto replaces all modules of sentence-transformers;
            ``max_length`` is lowered to what the model or its modules allow.

    Raises:
        ConfigError: an encoder, or a module of it, that is not known here.
        DataError: a file that is missing or damaged, or weights or a tokenizer that are not those of the encoder.
    """

    def __init__(self, folder: Path, options: EmbedderOptions) -> None:
        pooling, precision = options.pooling, options.precision
        has_modules = (folder / "modules.json").is_file()
        modules = read_modules(folder) if has_modules else SentenceModules(folder)
        if pooling != "auto" or not has_modules:
            step = {"cls": Pooling(["cls"]), "mean": Pooling(["mean"])}.get(pooling, TextMean())
            modules.steps, modules.folders = [step], []
        if options.query_instruction:
            modules.prompts["query"] = options.query_instruction
        self.device = _device(options.device)
        self.precision, self.batch_tokens, self.prompts = precision, options.batch_tokens, modules.prompts
        warn_of_slow_bf16(self.device, precision, "a precision of")
        self.sides_alike = self.prompts["query"] == self.prompts["passage"]
        self.model_group: ModelGroup | None = None
        self._tokenizer = _load_tokenizer(modules)
        self._model = _load_model(modules).to(self.device).eval()
        check_vocabulary(modules.encoder_folder, self._tokenizer, self._model)
        if self.device.type == "cpu" and precision == "fp32":
            use_onednn(self._model)
        self._steps = nn.ModuleList(modules.steps).to(self.device).eval()
        limits = [options.max_length, modules.max_length, self._tokenizer.model_max_length, _num_positions(self._model)]
        self.max_length = min(int(limit) for limit in limits if limit)
        self._check(modules)
        with torch.inference_mode():
            self.dim = self.embed(["a"]).shape[1]
        files = [path for place in [modules.encoder_folder, *modules.folders] for path in _files_of(place)]
        files += [folder / name for name in ("modules.json", "config_sentence_transformers.json")]
        settings = [pooling, self.max_length, precision, self.prompts["passage"]]
        self.fingerprint = digest_of_files(folder, files, settings)

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        """As :class:`~megatron_grit.inference.encoders.protocol.Embedder` says.

        Raises:
            DataError: a text without any token, or no text.
            NumericsError: a vector is not finite.
        """
        texts = check_texts(texts, "text")
        prompt = self.prompts[side]
        skip = self._num_prompt_tokens(prompt)
        parts: list[np.ndarray] = []
        for start, rows in self._tokenised(texts, prompt):
            vectors: np.ndarray | None = None
            for batch in self._batches(rows):
                found = self._forward([rows[number] for number in batch], skip)
                vectors = np.empty((len(rows), found.shape[1]), dtype=np.float32) if vectors is None else vectors
                vectors[batch] = found
            assert vectors is not None
            parts.append(finite(vectors, texts[start : start + len(rows)]))
        return np.concatenate(parts) if parts else np.empty((0, self.dim), dtype=np.float32)

    def _tokenised(self, texts: Sequence[str], prompt: str) -> Iterator[tuple[int, list[list[int]]]]:
        """Token ids of a window of texts at a time, with the number of its first text."""

        def tokenise(start: int) -> list[list[int]]:
            # The tokenizer's Rust code leaves Python to others while it works.
            return self._ids([prompt + text for text in texts[start : start + _WINDOW]])

        starts = range(0, len(texts), _WINDOW)
        if len(starts) <= 1:
            yield from ((start, tokenise(start)) for start in starts)
            return
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(tokenise, 0)
            for start in starts:
                rows = coming.result()
                if start + _WINDOW < len(texts):
                    coming = pool.submit(tokenise, start + _WINDOW)
                yield start, rows

    def _ids(self, texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = self._tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        empty = next((number for number, row in enumerate(rows) if not row), None)
        if empty is not None:
            raise DataError(f"the text {texts[empty]!r} has no token; there is nothing to embed")
        return rows

    def _batches(self, rows: list[list[int]]) -> Iterator[np.ndarray]:
        """Numbers of the rows of a batch, the longest rows first, so that little is padding."""
        lengths = np.array([len(row) for row in rows])
        order = np.argsort(-lengths, kind="stable")
        place = 0
        while place < len(order):
            count = max(1, self.batch_tokens // int(lengths[order[place]]))
            yield order[place : place + count]
            place += count

    def _forward(self, rows: list[list[int]], num_prompt_tokens: int) -> np.ndarray:
        lengths_B = torch.tensor([len(row) for row in rows])
        padded = np.full((len(rows), int(lengths_B.max())), self._tokenizer.pad_token_id or 0, dtype=np.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        tokens_BT = torch.from_numpy(padded).to(self.device)
        mask_BT = (torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]).to(self.device)
        is_bf16 = self.precision == "bf16"
        with torch.inference_mode():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
                output = self._model(input_ids=tokens_BT, attention_mask=mask_BT.long())
            features = Features(output.last_hidden_state.float(), mask_BT, num_prompt_tokens)
            for step in self._steps:
                features = step(features)
            assert features.vectors_BD is not None
            vectors: np.ndarray = features.vectors_BD.float().cpu().numpy()
        return vectors

    def _num_prompt_tokens(self, prompt: str) -> int:
        """Tokens that stand before a text because of its prompt: those of the prompt alone, without a closing special
        token, as sentence-transformers counts them."""
        if not prompt:
            return 0
        ids = self._ids([prompt])[0]
        return len(ids) - (ids[-1] in self._tokenizer.all_special_ids)

    def _check(self, modules: SentenceModules) -> None:
        special = self._tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        if any(isinstance(step, TextMean) for step in modules.steps) and (special[0], special[-1]) != (1, 1):
            raise ConfigError(
                f"{modules.encoder_folder}: its tokenizer does not put special tokens around a text, so mean_text "
                "would leave out words; set embedder_pooling to mean or cls"
            )
        for side, prompt in self.prompts.items():
            if self._num_prompt_tokens(prompt) + sum(special) >= self.max_length:
                raise ConfigError(
                    f"{modules.encoder_folder}: the {side} prompt fills the {self.max_length} tokens of a text"
                    if prompt
                    else f"embedder_max_length {self.max_length} leaves no room beside {sum(special)} special tokens"
                )


class OneDnnLinear(nn.Module):
    """A linear layer in fp32 by oneDNN, which torch itself takes for lower precisions only. On AMD's processors it is
    about twice as fast as MKL; on others no slower."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return output


def use_onednn(model: nn.Module) -> bool:
    """Let a model's linear layers compute by oneDNN, for inference in fp32 on a CPU. Returns whether torch has it."""
    probe = nn.Linear(4, 4)
    try:
        with torch.inference_mode():
            inputs = torch.ones(2, 4)
            if not torch.allclose(OneDnnLinear(probe)(inputs), probe(inputs), atol=1e-5):
                return False
    except (AttributeError, NotImplementedError, RuntimeError):
        return False  # a build of torch without it, or with another signature
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.float32:
                setattr(module, name, OneDnnLinear(child))
    return True


def _device(wanted: str) -> torch.device:
    # Not select_device("cpu"): it hides the GPUs from all that follows in this process.
    return torch.device("cpu") if wanted == "cpu" else select_device(wanted, "embedder_device")


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer of a directory.

    Args:
        folder: of the tokenizer.
        options: for ``AutoTokenizer.from_pretrained``.

    Raises:
        DataError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"has no tokenizer that transformers reads ({reason_of(error)})", path=folder) from None


def check_vocabulary(folder: Path, tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer that is not the model's. Where its files are missing, transformers makes one that knows only
    special tokens, and every word is an unknown one.

    Args:
        folder: of both, for the message.
        tokenizer: of transformers.
        model: of transformers.

    Raises:
        DataError: no words, numbers beyond the model's table of tokens, or far fewer than it has.
    """
    numbers = tokenizer.get_vocab()
    if not set(numbers) - set(tokenizer.all_special_tokens):
        raise DataError(
            "its tokenizer knows no word; copy tokenizer.json, or its vocabulary file, from where the model is from",
            path=folder,
        )
    try:
        num_rows = len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):  # a model that hashes characters has no such table
        return
    if max(numbers.values()) >= num_rows or 2 * len(numbers) < num_rows:
        raise DataError(
            f"its tokenizer has {len(numbers):,} tokens, numbered up to {max(numbers.values()):,}, and its model a "
            f"table of {num_rows:,}: it is damaged, or another model's; copy it from where the model is from",
            path=folder,
        )


def _load_tokenizer(modules: SentenceModules) -> Any:
    tokenizer = load_tokenizer(modules.encoder_folder, **modules.tokenizer_kwargs)
    if modules.lower_case:
        from tokenizers.normalizers import Lowercase, Sequence

        backend = tokenizer.backend_tokenizer
        parts = [Lowercase()] if backend.normalizer is None else [Lowercase(), backend.normalizer]
        backend.normalizer = Sequence(parts)
    return tokenizer


def _load_model(modules: SentenceModules) -> Any:
    """The encoder in fp32, whatever its files hold.

    Raises:
        ConfigError: not an encoder, or one whose code would have to be run.
        DataError: files that cannot be read, or that lack weights: transformers would draw these at random.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    folder = modules.encoder_folder
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"embedder {folder}: holds an adapter; merge it into its model and save that")
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **modules.config_kwargs
        )
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"embedder {folder}: {config.model_type} has a decoder; give an encoder")
        with quiet():
            model, report = AutoModel.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"holds no encoder that transformers reads ({reason_of(error)})", path=folder) from None
    # The pooler is not used.
    missing = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    if missing or report["mismatched_keys"]:
        names = [*missing, *(str(entry) for entry in report["mismatched_keys"])]
        raise DataError(f"its weights do not fit its config.json: {names[0]} and {len(names) - 1} more", path=folder)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar and its report of weights, which is checked here."""
    from transformers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def _num_positions(model: Any) -> int | None:
    """Tokens that the position table reaches. Families like RoBERTa begin to count after the padding id."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if not longest or longest < 0:
        return None
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return int(longest) - (0 if offset is None else offset + 1)


def _files_of(place: Path) -> list[Path]:
    """Files that a module may read."""
    if not place.is_dir():
        return []
    return [path for path in place.iterdir() if path.is_file() and path.suffix in _READ_SUFFIXES]


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
