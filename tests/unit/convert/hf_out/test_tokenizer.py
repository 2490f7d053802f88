"""Exported tokenizers and chat templates: transformers gives our ids."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.convert.hf_out.chat import jinja_of
from megatron_grit.convert.hf_out.tokenizer import write_tokenizer
from megatron_grit.data.chat.chat_templates import TEMPLATES
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.templates import embedding_prefix, encode_chat, encode_embedding, encode_prompt
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.errors import CheckpointError
from tests.corpus import sentences
from tests.unit.data.json_tokenizers import CHATML, chat_json

transformers = pytest.importorskip("transformers", reason="the reference is transformers")

TRAINING = [text for pair in sentences(60) for text in pair] + [
    "def f(x):\n    return 3.14 * x  # \u00e9t\u00e9 \u6f22\u5b57"
]
HARD = [
    "",
    " ",
    "  two  spaces, trailing  ",
    "\n\n\n",
    "\t\tif x:\r\n  y",
    "na\u00efve \u6f22\u5b57 \U0001f469\u200d\U0001f467 e\u0301 \u00a0 \u200b",
    "<|user|>\nx\n<|embed|>\ny",
    "a" * 40 + " " * 23 + "b",
]
CONVERSATIONS = [
    ["hi"],
    [" hi\n", " yes, it does \n", "and\n\nthen?"],
    [
        "what does the parser do?",
        "The parser opens a file.",
        "  why ",
        "\tbecause\n",
        "<|user|>",
        "<|assistant|>\n",
        "7 \u00e9",
    ],
]


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    import sentencepiece

    lines = [line for text in TRAINING for line in text.splitlines()]
    settings = {"vocab_size": 400, "minloglevel": 2, "character_coverage": 1.0, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), **settings
    )
    return folder / "tokenizer.model"


def make_tokenizer(kind: str, folder: Path) -> Path:
    """A tokenizer's file of one of the kinds that models have."""
    if kind in ("bpe", "unigram"):
        return train_sentencepiece(TRAINING, folder / "tokenizer", 340, model_type=kind)
    if kind == "llama":
        options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
        return sentencepiece_model(folder, model_type="bpe", byte_fallback=True, vocab_size=420, **options)
    if kind == "normalised":
        return sentencepiece_model(folder, model_type="bpe", byte_fallback=True, vocab_size=420)
    if kind == "no_prefix":
        return sentencepiece_model(folder, model_type="bpe", byte_fallback=True, vocab_size=420, add_dummy_prefix=False)
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"] if kind == "chatml" else ["<|endoftext|>"]
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML} if kind == "chatml" else None
    return chat_json(folder / kind, TRAINING, special_tokens=special, vocab_size=420, settings=settings)


KINDS = ["bpe", "unigram", "llama", "normalised", "no_prefix", "chatml", "gpt2"]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    """(kind, our tokenizer, what AutoTokenizer makes of the export)."""
    folder = tmp_path_factory.mktemp(request.param)
    ours = load_tokenizer(make_tokenizer(request.param, folder))
    out = folder / "out"
    out.mkdir()
    write_tokenizer(out, ours, 512, jinja_of(TEMPLATES["gritlm"]))
    return request.param, ours, transformers.AutoTokenizer.from_pretrained(out)


def texts(ours: Tokenizer) -> list[str]:
    """Hard ones, and pieces of the training text with noise."""
    generator = random.Random(3)
    found = list(HARD)
    for _ in range(150):
        text = generator.choice(TRAINING)
        place = generator.randrange(len(text))
        part = text[place : place + generator.randrange(1, 80)]
        found.append("".join(char * generator.choice((1, 1, 1, 2, 5)) for char in part))
    return found


def test_ids_are_ours_behind_bos(pair: tuple[str, Tokenizer, Any]) -> None:
    kind, ours, theirs = pair
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert len(theirs) == ours.vocab_size and theirs.model_max_length == 512
    different = [text for text in texts(ours) if theirs(text)["input_ids"] != [ours.bos_id, *ours.encode(text)]]
    # A unigram model chooses between orders that are equally likely.
    assert different == [] if kind != "unigram" else len(different) <= 3
    assert theirs("a b", add_special_tokens=False)["input_ids"] == ours.encode("a b")
    assert theirs("a b").keys() == {"input_ids", "attention_mask"}


def test_texts_to_embed(pair: tuple[str, Tokenizer, Any]) -> None:
    """Template and text in one go are the ids of both parts here."""
    _, ours, theirs = pair
    for instruction in ("", "Find the answer"):
        for text in ("the parser", " two\nlines ", "\u6f22\u5b57"):
            head, tail = encode_embedding(ours, text, instruction)
            assert theirs(embedding_prefix(instruction) + text)["input_ids"] == head + tail


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_chat_templates_over_several_turns(pair: tuple[str, Tokenizer, Any], name: str) -> None:
    """Conversations and prompts, with a system message and without, id for id."""
    kind, ours, theirs = pair
    source = jinja_of(TEMPLATES[name])
    for turns in CONVERSATIONS:
        for system in ([], [("system", " Be brief. ")]):
            roles = [*system, *((("user", "assistant")[place % 2], turn) for place, turn in enumerate(turns))]
            messages = [{"role": role, "content": content} for role, content in roles]
            ours_of = [Message(role, content) for role, content in roles]
            got = theirs.apply_chat_template(
                messages, chat_template=source, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            assert got == encode_prompt(ours, ours_of, name), (kind, name, roles)
            answered = [*ours_of, Message("assistant", "So it is.")]
            spans = _whole(ours, answered, name)
            if spans is not None:
                said = [*messages, {"role": "assistant", "content": "So it is."}]
                assert theirs.apply_chat_template(said, chat_template=source, return_dict=True)["input_ids"] == spans


def _whole(tokenizer: Tokenizer, messages: list[Message], name: str) -> list[int] | None:
    """Ids of a conversation; None where the tokenizer does not keep its answers apart."""
    from megatron_grit.errors import DataError

    try:
        return [index for _, ids in encode_chat(tokenizer, messages, template=name) for index in ids]
    except DataError:
        return None


def test_a_role_that_is_none_is_refused(pair: tuple[str, Tokenizer, Any]) -> None:
    _, _, theirs = pair
    with pytest.raises(Exception, match="there is no role tool here"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


def test_no_template_is_written_where_there_is_none(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, load_tokenizer(make_tokenizer("chatml", tmp_path)), 64, None)
    assert not (tmp_path / "chat_template.jinja").exists()


def test_a_file_that_gives_our_ids_is_kept_as_it_is(tmp_path: Path) -> None:
    """Its SHA-256 names it in indexed files; a second export is the first."""
    ours = load_tokenizer(make_tokenizer("gpt2", tmp_path))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_tokenizer(tmp_path / "one", ours, 64, None)
    again = load_tokenizer(tmp_path / "one")
    write_tokenizer(tmp_path / "two", again, 64, None)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
    assert again.encode("the parser") == ours.encode("the parser")
    model = train_sentencepiece(TRAINING, tmp_path / "sp", 420)
    (tmp_path / "three").mkdir()
    write_tokenizer(tmp_path / "three", load_tokenizer(model), 64, None)
    assert load_tokenizer(tmp_path / "three").fingerprint == load_tokenizer(model).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "word"}, "it is neither a unigram nor a BPE model"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "it marks spaces in a way of its own"),
        # Newlines are a piece here, and spaces for the normaliser of tokenizer.json.
        ({"model_type": "bpe", "user_defined_symbols": ["\n"]}, "as a tokenizer.json it would read"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    ours = load_tokenizer(sentencepiece_model(tmp_path, **options))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(tmp_path / "out", ours, 512, None)


def test_a_model_that_is_none(tmp_path: Path) -> None:
    from megatron_grit.convert.hf_out.sentencepiece_json import tokenizer_of_sentencepiece

    good = make_tokenizer("bpe", tmp_path).read_bytes()
    for content in (b"nothing of the kind", good[: len(good) // 2], b"\xff\xff\xff"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.model: not a SentencePiece model"):
            tokenizer_of_sentencepiece(tmp_path / "bad.model")


def test_qwen2_reads_by_rules_of_its_own(tmp_path: Path) -> None:
    """Transformers takes Qwen2's tokenizer for every Qwen2 model, so another one is told of."""
    from megatron_grit.convert.hf_out.tokenizer import misread_by_transformers

    ours = load_tokenizer(make_tokenizer("bpe", tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, ours, 64, None)
    for model_type, is_misread in (("mistral", False), ("qwen2", True)):
        (out / "config.json").write_text(json.dumps({"model_type": model_type}))
        said = misread_by_transformers(out, ours)
        assert (said is not None and "as a Qwen2Tokenizer, which gives other ids" in said) is is_misread
