"""Folders of which two files say one thing: the tokenizer, its special and added tokens, the weights, the ends of an
answer. What transformers takes is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_grit.convert.families import llama
from megatron_grit.convert.hf_in.reader import SafetensorsFolder, open_weights
from megatron_grit.convert.hf_out.sentencepiece_json import tokenizer_of_sentencepiece
from megatron_grit.convert.hf_out.tokenizer import write_tokenizer
from megatron_grit.data.chat.chat import chat_beside
from megatron_grit.data.text.tokenizer import copy_tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.errors import DataError
from tests.corpus import sentences
from tests.unit.convert.hf_in.test_reader import write_shards
from tests.unit.convert.test_param_map import DENSE, random_hf
from tests.unit.data.json_tokenizers import CHATML, chat_json

transformers = pytest.importorskip("transformers", reason="the reference is transformers")

TEXTS = [text for pair in sentences(32) for text in pair]
PROBES = ["what does the <tool> é?", " two  spaces\n", "<|a|>x <tool>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
OTHER_NAMES = {"bos_token": "</s>", "eos_token": "<s>", "pad_token": "<unk>"}
OTHERS = {"bos_token": "<|a|>", "eos_token": {"content": "<|b|>", "lstrip": False}, "pad_token": "<s>"}


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_tokenizer_json_beside_another_tokenizer_model(tmp_path: Path, tokenizer_class: str) -> None:
    settings = NAMES | {"tokenizer_class": tokenizer_class}
    chat_json(tmp_path, TEXTS, settings=settings)
    train_sentencepiece(TEXTS, tmp_path / "tokenizer", 400)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.path.name == "tokenizer.json"
    for text in TEXTS[:8] + PROBES[1:2]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) != load_tokenizer(tmp_path / "tokenizer.model").encode(text)


def test_a_tokenizer_model_that_gives_the_same_ids_keeps_its_fingerprint(tmp_path: Path) -> None:
    """Data and checkpoints of earlier versions, and exports, go on being used together."""
    model = train_sentencepiece(TEXTS, tmp_path / "tokenizer", 400)
    tokenizer_of_sentencepiece(model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES))
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(model).fingerprint
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(TEXTS[0]) == load_tokenizer(model).encode(TEXTS[0])


ADDED = {"added_tokens_decoder": {"416": {"content": "<tool>", "special": True, "normalized": False}}}
FOLDERS: dict[str, dict[str, Any]] = {
    "map before config": {"tokenizer_config": NAMES, "special_tokens_map": OTHERS},
    "map alone": {"special_tokens_map": OTHERS},
    "map beside added_tokens_decoder": {"tokenizer_config": NAMES | ADDED, "special_tokens_map": OTHERS},
    "added_tokens": {"tokenizer_config": NAMES, "added_tokens": {"<tool>": 416}},
    "added_tokens by another id": {"tokenizer_config": NAMES, "added_tokens": {"<tool>": 900, "<x>": 500}},
    "added_tokens that are there": {"tokenizer_config": NAMES, "added_tokens": {"<|a|>": 2, "<tool>": 416}},
    "added_tokens beside a decoder": {"tokenizer_config": NAMES | ADDED, "added_tokens": {"<y>": 417}},
    "added_tokens without config": {"special_tokens_map": NAMES, "added_tokens": {"<tool>": 416}},
}


@pytest.mark.parametrize("case", FOLDERS)
def test_special_and_added_tokens(tmp_path: Path, case: str) -> None:
    """Names, ids and texts are those of AutoTokenizer; a checkpoint that takes the tokenizer with it keeps them."""
    folder, kept = tmp_path / "folder", tmp_path / "checkpoint"
    chat_json(folder, TEXTS, special_tokens=["<s>", "</s>", "<|a|>", "<|b|>"], vocab_size=416)
    for name, content in FOLDERS[case].items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    kept.mkdir()
    copy_tokenizer(load_tokenizer(folder), kept)
    for ours in (load_tokenizer(folder), load_tokenizer(kept)):
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
        assert ours.pad_id == (ours.eos_id if theirs.pad_token_id is None else theirs.pad_token_id)
        assert ours.vocab_size == len(theirs)
        special = set(theirs.all_special_tokens) | set(ours.special_tokens)
        for text in (text for text in PROBES if not any(name in text for name in special)):
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        for name in ("<tool>", "<x>", "<y>", "<|a|>"):
            known = theirs.get_added_vocab().get(name)
            ids = ours.encode(name)
            assert known == (
                ours.special_tokens[name] if name in ours.special_tokens else ids[0] if len(ids) == 1 else None
            )


MORE = {"400": {"content": "<tool>", "special": True, "rstrip": True}, "1": {"content": "<s>", "special": True}}
BESIDE_PIECES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "names": {"tokenizer_config": OTHER_NAMES},
    "map before config": {"tokenizer_config": NAMES, "special_tokens_map": OTHER_NAMES},
    "map beside added_tokens_decoder": {
        "tokenizer_config": NAMES | {"added_tokens_decoder": MORE},
        "special_tokens_map": OTHER_NAMES,
    },
    "added_tokens": {"tokenizer_config": NAMES | {"eos_token": "<x>"}, "added_tokens": {"<x>": 400}},
    "a piece": {"tokenizer_config": NAMES | {"eos_token": "<0x01>", "pad_token": "<unk>"}},
    "a symbol of the model's": {"tokenizer_config": NAMES, "added_tokens": {"\n": 3}},
}


@pytest.mark.parametrize("case", BESIDE_PIECES)
def test_what_stands_beside_a_sentencepiece_model(tmp_path: Path, case: str) -> None:
    """Begin, end, padding and added tokens are those of transformers, which has the model alone too; a checkpoint and
    an export keep them."""
    folder, kept, export = (tmp_path / name for name in ("folder", "kept", "export"))
    for place in (folder, kept, export):
        place.mkdir()
    train_sentencepiece(TEXTS, folder / "tokenizer", 400)
    for name, content in ({"tokenizer_config": {}} | BESIDE_PIECES[case]).items():
        kind = {"tokenizer_class": "LlamaTokenizer"} if name == "tokenizer_config" else {}
        (folder / f"{name}.json").write_text(json.dumps(content | kind))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    copy_tokenizer(load_tokenizer(folder), kept)
    write_tokenizer(export, load_tokenizer(folder), 64, None)
    for ours in (load_tokenizer(folder), load_tokenizer(kept), load_tokenizer(export)):
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
        assert ours.pad_id == (ours.eos_id if theirs.pad_token_id is None else theirs.pad_token_id)
        assert ours.vocab_size == len(theirs)
        for name in ("<tool>", "<x>"):
            assert ours.special_tokens.get(name) == theirs.get_added_vocab().get(name)
        for text in ("what does the é?", "<s>the</s>x"):  # the second is text here
            assert ours.decode([ours.bos_id, *ours.encode(text), ours.eos_id]) == text
        assert ours.encode(TEXTS[0]) == theirs(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert load_tokenizer(kept).fingerprint == load_tokenizer(folder).fingerprint
    assert load_tokenizer(folder).rstrip == ({400} if "decoder" in case else set())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 400}}, r"added_tokens.json beside it adds '<x>', .* give a tokenizer.json"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"270": {"content": "\u2581s"}}}},
            "tokenizer_config.* adds '▁s'",
        ),
        ({"tokenizer_config": {"eos_token": "<x>"}}, "eos_token of the files beside it is '<x>', .* its own has id 2"),
        (
            {"tokenizer_config": {"add_prefix_space": False}},
            "tokenizer_config.* says add_prefix_space False, and this model puts a space",
        ),
    ],
)
def test_what_a_sentencepiece_model_alone_cannot_hold(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    """What transformers adds to the model as text is refused, with the remedy; beside a tokenizer.json nobody asks."""
    model = train_sentencepiece(TEXTS, tmp_path / "tokenizer", 400)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(NAMES | content if name == "tokenizer_config" else content))
    with pytest.raises(DataError, match=r"tokenizer\.model: " + message):
        load_tokenizer(tmp_path)
    tokenizer_of_sentencepiece(model).save(str(tmp_path / "tokenizer.json"))
    if "eos_token" not in message:  # which nothing has
        assert load_tokenizer(tmp_path).path.name == "tokenizer.json"


def test_one_file_of_weights_beside_an_index(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shape = replace(DENSE, architecture="LlamaForCausalLM", add_qkv_bias=False)
    tensors = random_hf(llama.FAMILY, shape)
    write_shards(tmp_path, {name: tensor + 1 for name, tensor in tensors.items()})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(llama.hf_config(shape)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    with open_weights(tmp_path) as weights:
        assert all(torch.equal(weights[name], theirs[name]) for name in tensors)
        assert [file.name for file in weights.files] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(SafetensorsFolder(tmp_path)["model.norm.weight"], tensors["model.norm.weight"] + 1)


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": [2, 3]}),
        ({"eos_token_id": [1, 2]}, None),
        ({"eos_token_id": 3}, {}),
        ({}, None),
    ],
)
def test_ends_of_an_answer(tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> None:
    """generation_config.json, and without that file config.json; the tokenizer's EOS and the template's end as well."""
    chat_json(tmp_path, TEXTS, special_tokens=["<s>", "</s>", "<|a|>", "<|im_end|>", "<|im_start|>"], settings=NAMES)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    name = "config.json" if generation is None else "generation_config.json"
    theirs = transformers.GenerationConfig.from_pretrained(
        tmp_path, config_file_name=name, **({"_from_model_config": True} if generation is None else {})
    ).eos_token_id
    chat = chat_beside(load_tokenizer(tmp_path))
    expected = {1, 3} | {*(theirs if isinstance(theirs, list) else [] if theirs is None else [theirs])}
    assert chat is not None and set(chat.end_ids) == expected
