"""A sentence-transformers directory to start from: where its decoder is, and what its modules say about embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_grit.config.embedding_shape import SCALAR
from megatron_grit.convert.hf_in.reader import read_config_json
from megatron_grit.convert.hf_in.sentence_modules import Normalize, OnVectors, Pooling, SentenceModules, read_modules
from megatron_grit.convert.hf_in.stored_model import scores
from megatron_grit.convert.hf_out.embedding import POOLING
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


def decoder_folder(folder: Path) -> Path:
    """The directory of the decoder's config.json, weights and tokenizer: ``folder`` itself, or that of its
    modules.json's Transformer, such as ``0_Transformer``."""
    if (folder / "config.json").exists() or not (folder / "modules.json").is_file():
        return folder
    try:
        return read_modules(folder).encoder_folder
    except (ConfigError, DataError):
        return folder  # whoever reads it says what is missing


def embedder_defaults(folder: Path) -> dict[str, Any]:
    """Fields of :class:`~megatron_grit.config.schema.EmbeddingConfig` as a sentence-transformers model has them, or a
    reward model; the defaults where a run is silent. Logs which, and what has no counterpart here. Empty for others.

    Args:
        folder: of the decoder.
    """
    if (folder / "config.json").is_file() and scores(folder):
        return dict(SCALAR)
    root = next((each for each in (folder, folder.parent) if (each / "modules.json").is_file()), None)
    if root is None:
        return {}
    try:
        modules = read_modules(root)
    except (ConfigError, DataError) as error:
        log.warning(f"nothing is taken from modules.json about embedding: {error}")
        return {}
    if not modules.encoder_folder.samefile(folder):
        return {}
    pooling = next(step for step in modules.steps if isinstance(step, Pooling))
    ours = {theirs: name for name, theirs in POOLING.items()}
    # transformers takes a change of sentence_bert_config.json for a key that config.json has, and for no other.
    is_causal = read_config_json(folder).get("is_causal")
    found: dict[str, Any] = {"causal": is_causal is None or bool(modules.config_kwargs.get("is_causal", is_causal))}
    if len(pooling.modes) == 1 and pooling.modes[0] in ours:
        found["pooling"] = ours[pooling.modes[0]]
    if _compares_lengths(root, modules):
        found["normalize"] = False
    told = ", ".join(f"embedding.{key} {json.dumps(value)}" for key, value in sorted(found.items()))
    log.info(f"{root / 'modules.json'}: {told}, unless the run says otherwise")
    for what in _not_taken(modules, pooling, "pooling" in found):
        log.warning(f"{root / 'modules.json'}: {what}")
    return found


def _compares_lengths(root: Path, modules: SentenceModules) -> bool:
    """Whether its vectors are compared by dot products without being normalised."""
    if any(isinstance(step, Normalize) for step in modules.steps):
        return False
    file = root / "config_sentence_transformers.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings.get("similarity_fn_name") in ("dot", "dot_product")


def _not_taken(modules: SentenceModules, pooling: Pooling, is_known: bool) -> list[str]:
    said = []
    if not is_known:
        said.append(f"pooling {' and '.join(pooling.modes)} is not known here; embedding.pooling stays as it is")
    prompts = {side: prompt for side, prompt in modules.prompts.items() if prompt}
    if prompts:
        told = ", ".join(f"{side} {prompt!r}" for side, prompt in prompts.items())
        said.append(f"its prompts are not put in front of texts, write them into the data's: {told}")
    if any(isinstance(step, OnVectors) for step in modules.steps):
        said.append("its layers after the decoder are not read; embedding.num_linear_layers starts fresh ones")
    return said
