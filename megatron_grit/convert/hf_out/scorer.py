"""Files of an exported reward model: transformers' sequence classification with one label.

transformers reads the score at the last token that is not padding. Here it is the last token, which ends an answer, so
padding has to be another token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.hf_out.exported import Checkpoint, Exported
from megatron_grit.convert.hf_out.words import write_words
from megatron_grit.errors import CheckpointError
from megatron_grit.store.files import replacing, write_json

_LABEL = "reward"


def scorer_settings(exported: Exported) -> dict[str, Any]:
    """Keys of config.json beside those of the decoder."""
    return {
        "architectures": [exported.family.scorer_architecture],
        "id2label": {"0": _LABEL},
        "label2id": {_LABEL: 0},
        "num_labels": 1,
        "problem_type": "regression",
        "use_cache": False,
    }


def write_scorer(folder: Path, exported: Exported, settings: dict[str, Any]) -> None:
    """Write configuration, tokenizer, chat template and model card.

    Args:
        folder: of the export.
        exported: the model.
        settings: config.json of the decoder.

    Raises:
        CheckpointError: the tokenizer has no token to pad with, or its files would give other ids.
    """
    source = exported.source
    remarks = write_words(folder, source)
    pad_id, pad_token = _padding(folder, source)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        words = json.loads((folder / name).read_text(encoding="utf-8"))
        write_json(folder / name, words | {"pad_token": pad_token})
    write_json(folder / "config.json", settings | scorer_settings(exported) | {"pad_token_id": pad_id})
    with replacing(folder / "README.md") as file:
        file.write(_card(exported, source.model, remarks))


def _padding(folder: Path, source: Checkpoint) -> tuple[int, str]:
    """Id and name of the token to pad with: the tokenizer's own, else the one of unknown words."""
    tokenizer = source.tokenizer
    ends = {tokenizer.eos_id, *source.chat.end_ids}
    if tokenizer.pad_id not in ends:
        return tokenizer.pad_id, tokenizer.id_to_token(tokenizer.pad_id)
    name = json.loads((folder / "special_tokens_map.json").read_text(encoding="utf-8")).get("unk_token")
    index = (
        None
        if name is None
        else next((each for each in range(tokenizer.vocab_size) if tokenizer.id_to_token(each) == name), None)
    )
    if index is None or index in ends:
        raise CheckpointError(
            f"{tokenizer.path}: has no token to pad with but {tokenizer.id_to_token(tokenizer.eos_id)!r}, which ends "
            "answers; transformers reads a score before the padding, and would read it too early: name another token "
            "as pad_token in tokenizer_config.json beside it, and give that with --tokenizer"
        )
    return index, name


def _card(exported: Exported, model: ModelConfig, remarks: list[str]) -> str:
    """README.md."""
    code = [
        "    from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        "    tokenizer = AutoTokenizer.from_pretrained(PATH)",
        "    model = AutoModelForSequenceClassification.from_pretrained(PATH).eval()",
        '    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]',
        "    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()",
        '    batch = tokenizer([text], add_special_tokens=False, padding=True, return_tensors="pt")',
        "    print(model(**batch).logits[:, 0])",
    ]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\ntags:\n- reward-model\n---",
        f"# {exported.source.run.name}",
        f"A reward model: a {exported.family.name} decoder ({model.num_layers} layers, width {model.hidden_size}, "
        f"{model.vocab_size} tokens) that gives a conversation one number, larger for better answers. It was trained "
        "on pairs of answers, so only differences of rewards mean anything. The number is read at the token that ends "
        "the last answer; nothing may follow it.",
        "\n".join(code),
        "\n".join(f"- {remark}" for remark in remarks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
