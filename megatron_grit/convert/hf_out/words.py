"""What an export says of words: its tokenizer, its chat template, and what ends an answer."""

from __future__ import annotations

from pathlib import Path

from megatron_grit.convert.hf_out.chat import chat_template
from megatron_grit.convert.hf_out.exported import Checkpoint
from megatron_grit.convert.hf_out.tokenizer import write_tokenizer
from megatron_grit.store.files import write_json


def write_words(folder: Path, source: Checkpoint) -> list[str]:
    """Write the tokenizer's files, the chat template and generation_config.json of a checkpoint.

    Returns:
        Remarks for the model card.

    Raises:
        CheckpointError: the tokenizer's files would give other ids.
    """
    tokenizer, ends = source.tokenizer, list(source.chat.end_ids)
    settings = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    write_json(folder / "generation_config.json", settings | {"pad_token_id": tokenizer.pad_id})
    return write_tokenizer(folder, tokenizer, source.model.max_position_embeddings, chat_template(source.chat))
