"""The tokenizer of an exported model: files that AutoTokenizer reads and that give the same ids as ours.

Tokenised texts begin with BOS, as texts to embed and conversations do here. One difference remains, as with any
tokenizer of transformers: the name of a special token in a text becomes that token, where ours keeps it as text.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_grit.convert.hf_out.sentencepiece_json import tokenizer_of_sentencepiece
from megatron_grit.data.text.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_grit.data.text.tokenizer_settings import read_settings, token_name
from megatron_grit.errors import CheckpointError
from megatron_grit.store.files import replacing, write_json

_NUM_RANDOM_PROBES = 200
_PROBES = (
    "",
    " ",
    "a",
    " leading and trailing  ",
    "\n",
    "\n\n two lines\n\n\nand  three   four    spaces\t\ttabs \t \r\n return\r",
    "It's 12,345.678e-9 o'clock; e\u0301 \u00e9 \ufb01 \u210c \u2460 \u00a0 \u2003 \u200b \u180e x",
    "\u6f22\u5b57\u3068\u304b\u306a \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05dc\u05d5",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \U000e0067 \0 \x7f",
    "<|user|>\nName the capital\n<|embed|>\nParis",
    "<|embed|>\n text",
    "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello",
    "\n<|user|>\nagain",
    "[INST] <<SYS>>\nx\n<</SYS>>\n\ny [/INST] z ",
    "aaaaaaaaaaaaaaaaaaaaaaaa" + " " * 37 + "=" * 61 + "-----" * 7,
    "def f(x):\n    return {'a': [x ** 2, 0xFF]}  # \\n \\u00e9\n",
    "https://example.org/a_b?c=d&e=%20f#g",
)
"""Texts that tokenizers tend to disagree on, and the templates."""


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int, chat_template: str | None) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, and a SentencePiece model as it is.

    Args:
        max_length: tokens that the model may see.
        chat_template: Jinja. None: none.

    Returns:
        Sentences for the model card about differences in the ids.

    Raises:
        CheckpointError: the files would give other ids than ``tokenizer`` does.
    """
    backend = _backend_of(tokenizer)
    names = special_names(tokenizer) | _unknown_token(backend, tokenizer)
    # What the templates write as ids must be read as ids by those who render them as text.
    _mark_special(backend, names.values())
    plain = backend.post_processor
    if not _begins_with_bos(backend, tokenizer):
        backend.post_processor = _bos_in_front(names["bos_token"], tokenizer.bos_id)
    remarks = _compare(backend, tokenizer)
    if isinstance(tokenizer, JsonTokenizer) and backend.post_processor is plain and not _changed(backend, tokenizer):
        shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
    else:
        with replacing(folder / "tokenizer.json") as file:
            file.write(backend.to_str(pretty=True))
    if not isinstance(tokenizer, JsonTokenizer):
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    settings: dict[str, Any] = {
        # By this name both transformers 4 and 5 take tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        # Else transformers 4 adds token_type_ids, which generate() refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
        with replacing(folder / "chat_template.jinja") as file:
            file.write(chat_template)
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", names)
    return remarks


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token and pad_token."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {name: tokenizer.id_to_token(index) for name, index in ids.items()}


def _unknown_token(backend: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """unk_token, where there is one."""
    model = json.loads(backend.to_str())["model"]
    name = token_name(read_settings(tokenizer.path).get("unk_token")) or model.get("unk_token")
    if name is None and model.get("unk_id") is not None:
        name = model["vocab"][model["unk_id"]][0]
    return {} if name is None else {"unk_token": name}


def _backend_of(tokenizer: Tokenizer) -> Any:
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.backend()
    assert isinstance(tokenizer, SentencePieceTokenizer)
    backend = tokenizer_of_sentencepiece(tokenizer.path)
    backend.add_tokens([token for _, token in sorted(tokenizer.added_tokens.items())])
    return backend


def _mark_special(backend: Any, names: Any) -> None:
    from tokenizers import AddedToken

    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [name for name in dict.fromkeys(names) if name not in special]
    if missing:
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in missing])


def _changed(backend: Any, tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer differs from its file."""
    from tokenizers import Tokenizer as Backend

    return bool(backend.to_str() != Backend.from_file(str(tokenizer.path)).to_str())


def _begins_with_bos(backend: Any, tokenizer: Tokenizer) -> bool:
    return all(backend.encode(text).ids == [tokenizer.bos_id, *tokenizer.encode(text)] for text in ("", "a b"))


def _bos_in_front(name: str, index: int) -> Any:
    from tokenizers import processors

    pair = [f"{name}:0", "$A:0", f"{name}:1", "$B:1"]
    return processors.TemplateProcessing(single=pair[:2], pair=pair, special_tokens=[(name, index)])


def _compare(backend: Any, tokenizer: Tokenizer) -> list[str]:
    """Compare ids on hard and random texts, at the start of a text and after a special token.

    Raises:
        CheckpointError: they differ by more than a choice between equally likely pieces.
    """
    probes = _probes(backend, tokenizer)
    eos = tokenizer.id_to_token(tokenizer.eos_id)
    ties = 0
    for text in probes:
        ours = tokenizer.encode(text)
        for got, expected in (
            (backend.encode(text).ids, [tokenizer.bos_id, *ours]),
            (backend.encode(eos + text, add_special_tokens=False).ids, [tokenizer.eos_id, *ours]),
        ):
            if got != expected and not _is_tie(backend, got, expected):
                raise CheckpointError(
                    f"{tokenizer.path}: as a tokenizer.json it would read {text[:60]!r} as {_spell(tokenizer, got)} "
                    f"and not as {_spell(tokenizer, expected)}; give --tokenizer with the model's own tokenizer.json"
                )
            ties += got != expected
    if not ties:
        return []
    return [
        f"Of {2 * len(probes)} texts that were compared, tokenizer.json reads {ties} as other pieces than the "
        "SentencePiece model does, because several ways to cut them are equally likely."
    ]


def _probes(backend: Any, tokenizer: Tokenizer) -> list[str]:
    """Hard texts and random ones, without the names of special tokens."""
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    generator = random.Random(0)
    probes = list(_PROBES)
    for _ in range(_NUM_RANDOM_PROBES):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(1, 24))]
        probes.append(tokenizer.decode(ids))
    return [text for text in probes if not any(name in text for name in special)]


def misread_by_transformers(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Why AutoTokenizer gives other ids than tokenizer.json. None: it does not, or transformers is not installed.

    For some architectures (Qwen2) transformers 5 takes only the vocabulary of tokenizer.json and splits texts by rules
    of its own.

    Args:
        folder: an exported directory with config.json and the tokenizer's files.
    """
    try:
        from transformers import AutoTokenizer, __version__
    except ImportError:
        return None
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(str(folder))
    if all(loaded(text)["input_ids"] == backend.encode(text).ids for text in _probes(backend, tokenizer)):
        return None
    return (
        f"transformers {__version__} reads this tokenizer as a {type(loaded).__name__}, which gives other ids; take "
        "PreTrainedTokenizerFast.from_pretrained in place of AutoTokenizer"
    )


def _is_tie(backend: Any, got: Sequence[int], expected: Sequence[int]) -> bool:
    """A unigram model picks the likeliest pieces; in another order they are equally likely."""
    kind = json.loads(backend.to_str())["model"]["type"] if got != expected else None
    return kind == "Unigram" and Counter(got) == Counter(expected)


def _spell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str([tokenizer.id_to_token(index) for index in ids[:12]])
