"""Properties of special tokens: the ids of a rendering are those that the tokenizers library gives the whole string."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_grit.data.chat.chat import make_chat, named_chat
from megatron_grit.data.chat.chat_templates import TEMPLATES, load_chat_format
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message, TextPair
from megatron_grit.data.text.spans import encode_units
from megatron_grit.data.text.templates import embedding_pieces
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import DataError
from tests.unit.data.json_tokenizers import chat_json
from tests.unit.data.samples import TEXT

tokenizers = pytest.importorskip("tokenizers")

NAMES = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|user|>\nx", "<|embed|>", "<|im_start|>", "<|im_end|>", "end")
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
UPPER = "{% for m in messages %}{{ '<|' + m['role'] | upper + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
NORMALIZERS: dict[str, Any] = {
    "none": None,
    "lowercase": {"type": "Lowercase"},
    "nfkc": {"type": "NFKC"},
    "llama": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    },
}
LONGER = ("<|user|>\n", "b<|", "<|im_start|>user\na", "<|IM_END|>")
FLAGS = st.fixed_dictionaries({key: st.booleans() for key in ("lstrip", "rstrip", "single_word", "normalized")})
WORDS = st.text(" \n\t\x1cab.é\u00a0", max_size=6)
COUNT = itertools.count()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = chat_json(tmp_path_factory.mktemp("base"), [TEXT], special_tokens=NAMES, vocab_size=290)
    return json.loads(path.read_text())


def variant(state: dict[str, Any], folder: Path, flags: dict[str, dict[str, bool]], metaspace: bool = False) -> Any:
    """The tokenizer with flags, in our hands and the library's."""
    state = json.loads(json.dumps(state))
    for token in state["added_tokens"]:
        token.update(flags.get(token["content"], {}))
    if metaspace:
        parts = [{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}]
        parts.append(state["pre_tokenizer"])  # bytes of the mark have ids
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    folder = folder / str(next(COUNT))
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(state))
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": PHI}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def check(ours: Tokenizer, theirs: Any, pieces: list[Any]) -> None:
    names = {index: name for name, index in ours.special_tokens.items()}
    text = "".join(value if isinstance(value, str) else names[value] for _, value in pieces)
    ids = encode_units(ours, [pieces]).tokens.tolist()
    assert ids == theirs.encode(text, add_special_tokens=False).ids, text


def test_phi(state: dict[str, Any], tmp_path: Path) -> None:
    strips = {name: {"rstrip": True} for name in ("<|user|>", "<|assistant|>", "</s>")}
    ours, theirs = variant(state, tmp_path, strips)
    chat = load_chat_format("tokenizer", ours)
    turns = [Message("user", " a\n"), Message("assistant", "b"), Message("user", "a"), Message("assistant", "b ")]
    pieces = chat.pieces(turns)
    check(ours, theirs, pieces)
    answers = [ids for role, ids in encode_units(ours, [pieces]).spans(0) if role == Role.ANSWER]
    assert answers == [[*ours.encode("b"), ours.eos_id], [*ours.encode("b "), ours.eos_id]]


def test_only_unicode_white_space_is_taken(state: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = variant(state, tmp_path, {"<s>": {"rstrip": True}, "</s>": {"lstrip": True}})
    pieces = [
        (Role.TEMPLATE, ours.bos_id),
        (Role.USER, "\u2003\x85\x1c"),
        (Role.ANSWER, " "),
        (Role.ANSWER, ours.eos_id),
    ]
    check(ours, theirs, pieces)
    spans = encode_units(ours, [pieces]).spans(0)
    assert [role for role, _ in spans] == [Role.TEMPLATE, Role.USER, Role.ANSWER]


def test_tokenizer_config_has_the_last_word(state: dict[str, Any], tmp_path: Path) -> None:
    """added_tokens_decoder: properties replace those of tokenizer.json, and tokens that are only there are added."""
    transformers = pytest.importorskip("transformers")
    ours, _ = variant(state, tmp_path, {})
    path = ours.path.with_name("tokenizer_config.json")
    plain = {"lstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {
        "290": {"content": "<new>", "rstrip": False, **plain},
        "2": {"content": "<|user|>", "rstrip": True, **plain},
    }
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(json.loads(path.read_text()) | kind | {"added_tokens_decoder": added}))
    ours, theirs = load_tokenizer(ours.path), transformers.AutoTokenizer.from_pretrained(str(path.parent))
    user, new = ours.special_tokens["<|user|>"], ours.special_tokens["<new>"]
    pieces = [(Role.TEMPLATE, user), (Role.USER, "\n a"), (Role.TEMPLATE, new)]
    assert ours.vocab_size == 291
    expected = theirs("<|user|>\n a<new>", add_special_tokens=False).input_ids
    assert encode_units(ours, [pieces]).tokens.tolist() == expected == [user, *ours.encode("a"), new]
    path.write_text(json.dumps({"added_tokens_decoder": {"x": 1}}))
    with pytest.raises(DataError, match="added_tokens_decoder"):
        load_tokenizer(ours.path)


def test_single_word(state: dict[str, Any], tmp_path: Path) -> None:
    """A token that has to be a word is text beside a letter, though the letter is a message's."""
    ours, theirs = variant(state, tmp_path, {"end": {"single_word": True}})
    path = ours.path.with_name("chat_template.jinja")
    path.write_text("{% for m in messages %}{{ 'end' + m['content'] + '</s>end' }}{% endfor %}")
    chat = load_chat_format("tokenizer", ours)
    for content in ("a", " a", "_", "\u00e9", "."):
        messages = [Message("user", content), Message("assistant", content)]
        text = chat.render(messages)  # type: ignore[attr-defined]
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert encode_units(ours, [chat.pieces(messages)]).tokens.tolist() == expected


def test_a_named_template_has_text_beside_a_word(state: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = variant(state, tmp_path, {"<|im_end|>": {"single_word": True}})
    end = ours.special_tokens["<|im_end|>"]
    for content, count in (("a.", 2), ("a", 0), (".", 2), ("\u00e9", 0)):
        pieces = load_chat_format("chatml", ours).pieces([Message("user", content), Message("assistant", content)])
        check(ours, theirs, pieces)
        assert encode_units(ours, [pieces]).tokens.tolist().count(end) == count


def test_symbols_that_a_sentencepiece_model_defines(tmp_path: Path) -> None:
    """They are tokens wherever they stand, so an answer ends with one, and generation with it."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 3),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["\n", "<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    ours = load_tokenizer(tmp_path / "tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(ours.path))
    end = library.piece_to_id("<|im_end|>")
    assert named_chat("chatml", ours, "a test").end_ids == (ours.eos_id, end)
    contents = (" the fox", "jumps over ", "the", "dog.")
    messages = [Message(role, text) for role, text in zip(("user", "assistant") * 2, contents, strict=True)]
    pieces = load_chat_format("chatml", ours).pieces(messages)
    spans = encode_units(ours, [pieces]).spans(0)
    assert [index for _, ids in spans for index in ids] == library.encode("".join(str(value) for _, value in pieces))
    answers = [ids for role, ids in spans if role is Role.ANSWER]
    assert [ids[-1] for ids in answers] == [end, end] and [ids.count(end) for ids in answers] == [1, 1]
    assert named_chat("tulu", ours, "a test").end_ids == (ours.eos_id,)


def test_an_added_token_that_is_not_special_ends_an_answer(state: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = variant(state, tmp_path, {name: {"special": False} for name in ("<|im_end|>", "end")})
    assert named_chat("chatml", ours, "a test").end_ids == (ours.eos_id, theirs.token_to_id("<|im_end|>"))
    check(ours, theirs, load_chat_format("chatml", ours).pieces([Message("user", "a"), Message("assistant", "b")]))


@pytest.mark.parametrize("end", ["END", "b", "\n", "..", "<|no|>"])
def test_what_may_be_text_ends_nothing(state: dict[str, Any], tmp_path: Path, end: str) -> None:
    ours, _ = variant(state, tmp_path, {})
    template = {"user": "{content}\n", "assistant": "", "answer": "{content}" + end + "|"}
    assert make_chat("own", template, ours, "a test").end_ids == (ours.eos_id,)


@pytest.mark.parametrize("normalizer", [name for name in NORMALIZERS if name != "none"])
def test_names_that_are_looked_for_in_normalised_text(state: dict[str, Any], tmp_path: Path, normalizer: str) -> None:
    """Under Llama's normaliser a name is found behind a space or at the beginning, which it takes."""
    flags = {name: {"normalized": True} for name in NAMES if name not in ("<s>", "</s>")}
    ours, theirs = variant(state | {"normalizer": NORMALIZERS[normalizer]}, tmp_path, flags)
    source = UPPER if normalizer == "lowercase" else PHI
    ours.path.with_name("chat_template.jinja").write_text(source.replace("'<|' +", "': <|' +"))
    contents = ("a b", "\ufb01b ", "Ab", "<|user|>")
    messages = [Message(role, content) for role, content in zip(("user", "assistant") * 2, contents, strict=True)]
    chat = load_chat_format("tokenizer", ours)
    pieces = chat.pieces(messages)
    found = encode_units(ours, [pieces]).tokens.tolist()
    assert [found.count(ours.special_tokens[name]) for name in ("<|user|>", "<|assistant|>")] == [2, 2]
    check(ours, theirs, chat.pieces([*messages[:3], Message("assistant", "b")]))
    text = [(Role.USER, "a"), (Role.TEMPLATE, ours.special_tokens["<|user|>"])]
    assert (ours.special_tokens["<|user|>"] in encode_units(ours, [text]).tokens.tolist()) == (normalizer != "llama")


def test_a_longer_token_that_is_not_special(state: dict[str, Any], tmp_path: Path) -> None:
    """The longest counts, whether it is special or not."""
    longer = {"id": 290, "content": "<|user|>\n", "special": False, "normalized": False}
    longer |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    ours, theirs = variant(state | {"added_tokens": [*state["added_tokens"], longer]}, tmp_path, {})
    pieces = load_chat_format("tokenizer", ours).pieces([Message("user", "a"), Message("assistant", "b")])
    check(ours, theirs, pieces)
    found = encode_units(ours, [pieces]).tokens.tolist()
    assert found.count(290) == 1 and ours.special_tokens["<|user|>"] not in found


CASES: dict[str, tuple[str, dict[str, list[str]], list[str | int]]] = {
    "a space before a normalised one": ("llama", {"<|user|>": ["normalized"]}, [" ", "<|user|>", "a"]),
    "the same behind BOS": ("llama", {"<|user|>": ["normalized", "lstrip"]}, ["<s>", " ", "<|user|>", " a"]),
    "white space that two take": (
        "nfkc",
        {"<|user|>": ["rstrip"], "end": ["lstrip"]},
        ["<|user|>", " \n ", "end", "a"],
    ),
    "white space of a message": ("none", {"<|user|>\nx": ["normalized"], "<|user|>": ["lstrip"]}, [" ", "<|user|>\nx"]),
    "behind a normalised one": (
        "none",
        {"<|user|>": ["normalized", "rstrip"], "end": ["lstrip"]},
        ["<|user|>", " ", "end"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_spaces_beside_special_tokens(state: dict[str, Any], tmp_path: Path, name: str) -> None:
    normalizer, flags, parts = CASES[name]
    given = {token: dict.fromkeys(properties, True) for token, properties in flags.items()}
    ours, theirs = variant(state | {"normalizer": NORMALIZERS[normalizer]}, tmp_path, given)
    ids = ours.special_tokens
    check(ours, theirs, [(Role.TEMPLATE, ids[part]) if part in ids else (Role.USER, part) for part in parts])


def test_a_longer_token_behind_a_normalised_one(state: dict[str, Any], tmp_path: Path) -> None:
    """A name of which the normaliser has put a space in front is not found without it."""
    longer = {"id": 290, "content": "b<|", "special": False, "normalized": True}
    longer |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    state = state | {"normalizer": NORMALIZERS["llama"], "added_tokens": [*state["added_tokens"], longer]}
    ours, theirs = variant(state, tmp_path, {"<|user|>": {"normalized": True}})
    for text in (".b<|", ". b<|"):
        check(ours, theirs, [(Role.TEMPLATE, ours.special_tokens["<|user|>"]), (Role.USER, text)])


PIECES = st.one_of(st.sampled_from(NAMES), st.sampled_from([" ", "  ", "a", " a", "a ", "\n", " \n", "b", " b ", "."]))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ids_are_those_of_the_whole_string(
    state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    flags = {name: data.draw(FLAGS, label=name) for name in NAMES}
    for name in ("<s>", "</s>"):
        flags[name] |= {"single_word": False, "normalized": False}  # templates give their ids, and not their names
    longer = data.draw(st.sets(st.sampled_from(LONGER), max_size=2), label="longer")
    state = state | {"normalizer": NORMALIZERS[data.draw(st.sampled_from(list(NORMALIZERS)), label="normalizer")]}
    state["added_tokens"] = state["added_tokens"] + [
        {"id": 290 + place, "content": name, "special": False} | data.draw(FLAGS, label=name)
        for place, name in enumerate(sorted(longer))
    ]
    ours, theirs = variant(state, tmp_path_factory.getbasetemp(), flags, data.draw(st.booleans(), label="metaspace"))
    contents = data.draw(st.lists(WORDS, min_size=4, max_size=4), label="contents")
    roles = ("user", "assistant", "user", "assistant")
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=True)]
    for name in (*TEMPLATES, "tokenizer"):
        check(ours, theirs, load_chat_format(name, ours).pieces(messages))
    parts = data.draw(st.lists(st.lists(PIECES, min_size=1, max_size=6), min_size=8, max_size=8), label="pieces")
    for each in parts if not longer else ():  # beside longer tokens a piece need not be found by itself
        ids = ours.special_tokens
        check(ours, theirs, [(Role.TEMPLATE, ids[part]) if part in ids else (Role.USER, part) for part in each])
    for instruction in ("", contents[0]):
        check(ours, theirs, embedding_pieces(ours, TextPair(instruction, contents[1]), Role.USER, Role.QUERY))
