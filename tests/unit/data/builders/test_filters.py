"""What makes two records the same, and what counts as held out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.builders.filters import HeldOut, contents, fingerprint, words
from megatron_grit.data.text.records import parse_record
from megatron_grit.errors import ConfigError, DataError

LONG = "the quick brown fox jumps over a lazy dog while seven old bakers count their loaves"


def print_of(value: object) -> bytes:
    return fingerprint(parse_record(value))


def test_white_space_does_not_tell_records_apart() -> None:
    assert len(print_of({"text": "a b"})) == 16
    assert print_of({"text": "a  b\n"}) == print_of({"text": " a b", "source": "elsewhere"})
    messages = [{"role": "user", "content": "u "}, {"role": "assistant", "content": "a"}]
    assert print_of({"text": ["u", " a"]}) == print_of({"messages": messages})


def test_everything_else_does() -> None:
    values: list[object] = [
        {"text": "a b"},
        {"text": "A b"},
        {"text": ["a", "b"]},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a b", "completion": ""},
        {"query": "a", "pos": ["b"]},
        {"query": "a", "pos": ["b"], "neg": ["b"]},
        {"query": "a", "pos": ["b", "b"]},
        {"query": ["", "a"], "pos": ["b"]},
        {"query": ["i", "a"], "pos": ["b"]},
        {
            "messages": [
                {"role": "system", "content": ""},
                *({"role": r, "content": r[0]} for r in ("user", "assistant")),
            ]
        },
        {"messages": [{"role": r, "content": r[0]} for r in ("user", "assistant")]},
    ]
    assert len({print_of(value) for value in values}) == len(values)


def calling(city: str, **more: object) -> dict[str, object]:
    call = {"function": {"name": "weather", "arguments": {"city": city, "days": 3}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], **more}
    return {"messages": [{"role": "user", "content": "u"}, answer]}


def test_what_messages_hold_beside_their_content_does_too() -> None:
    tools = {"tools": [{"name": "weather"}]}
    values = [calling("Rome"), calling("Bonn"), calling("Rome", reasoning_content="a"), calling("Rome") | tools]
    assert len({print_of(value) for value in values}) == len(values)
    turned = {"arguments": {"days": 3, "city": "Rome"}, "name": "weather"}
    assert print_of(calling("Rome", tool_calls=[{"function": turned}])) == print_of(calling("Rome"))


def test_what_the_template_does_not_read_tells_nothing_apart() -> None:
    noted = parse_record(calling("Rome", timestamp="noon"))
    assert fingerprint(noted) == print_of(calling("Rome"))
    assert fingerprint(noted, {"tool_calls", "timestamp"}) != print_of(calling("Rome"))


def test_fingerprints_of_messages_stay_what_they_were() -> None:
    messages = [{"role": role, "content": role} for role in ("user", "assistant")]
    assert print_of({"messages": messages}).hex() == "6939b07bd6ce6ca3686ffc66a62a5c94"


def test_calls_and_reasoning_are_compared_with_held_out_text(tmp_path: Path) -> None:
    keep_out = held_out(tmp_path, {"text": LONG})
    for record in (calling(LONG), calling("Rome", reasoning_content=LONG)):
        assert keep_out.overlap(contents(parse_record(record))) is not None
    assert contents(parse_record(calling("Rome", timestamp="noon"))) == ["u", "", "weather", "Rome"]


def held_out(tmp_path: Path, *records: object, ngram: int = 13, name: str = "test.jsonl") -> HeldOut:
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return HeldOut([path], ngram)


def test_shared_words_are_found_and_named(tmp_path: Path) -> None:
    keep_out = held_out(tmp_path, {"query": ["Find it", LONG], "pos": ["short"]})
    assert keep_out.overlap([f"So, THE Quick -- {LONG[10:]}!"]) == " ".join(words(LONG)[:13])
    assert keep_out.overlap([LONG.replace("lazy", "")]) is None
    assert keep_out.overlap(words(LONG)) is None  # the words, but each in a text of its own


def test_instructions_and_system_messages_are_not_compared(tmp_path: Path) -> None:
    record = {"query": [LONG, "one"], "pos": [[LONG, "two"]], "neg": ["three"]}
    assert contents(parse_record(record)) == ["one", "two", "three"]
    keep_out = held_out(tmp_path, record)
    assert keep_out.overlap([LONG]) is None
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert contents(parse_record({"messages": messages})) == ["user", "assistant"]


def test_short_records_are_compared_whole(tmp_path: Path) -> None:
    keep_out = held_out(tmp_path, {"text": ["Is it?", "Yes."]}, {"question": "What is Python?"})
    assert keep_out.overlap(["is it", "yes"]) == "is it yes"
    assert keep_out.overlap(["What is python", "A snake"]) == "what is python"
    assert keep_out.overlap(["Was it?", "Yes."]) is None  # an answer alone is not the record
    assert keep_out.overlap(["So what is Python?"]) is None


def test_files_of_other_formats(tmp_path: Path) -> None:
    keep_out = held_out(tmp_path, {"data": [{"context": LONG, "id": 3}], "title": "a"})
    assert keep_out.overlap([LONG]) is not None
    (tmp_path / "lines.txt").write_text(f"\n{LONG}\nshort line\n")
    assert HeldOut([tmp_path / "lines.txt"]).overlap(["Short line!"]) == "short line"
    (tmp_path / "lines.txt.gz").write_bytes(gzip.compress(LONG.encode()))
    assert HeldOut([tmp_path / "lines.txt.gz"]).overlap([LONG]) is not None


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(DataError, match=rf"^{path}:2: expected a JSON object"):
        HeldOut([path])
    path.write_text('{"id": 3}\n')
    with pytest.raises(DataError, match="holds no text to keep out"):
        HeldOut([path])
    with pytest.raises(DataError, match="no such input file"):
        HeldOut([tmp_path / "absent"])
    with pytest.raises(ConfigError, match="n-grams of 0 words"):
        HeldOut([path], 0)


WORDS = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


@given(theirs=st.lists(WORDS, min_size=1, max_size=3), ours=st.lists(WORDS, max_size=3), ngram=st.integers(1, 4))
def test_against_all_pairs_of_ngrams(
    tmp_path_factory: pytest.TempPathFactory, theirs: list[str], ours: list[str], ngram: int
) -> None:
    path = tmp_path_factory.mktemp("held") / "test.txt"
    path.write_text("\n".join([*theirs, "zzz"]))

    def ngrams(text: str) -> set[tuple[str, ...]]:
        split = text.split()
        return {tuple(split[at : at + ngram]) for at in range(len(split) - ngram + 1)}

    shared = any(ngrams(a) & ngrams(b) for a in theirs for b in ours)
    short = {text for text in theirs if text and len(text.split()) < ngram}
    whole = short & ({*ours, " ".join(text for text in ours if text)} - {""})
    assert (HeldOut([path], ngram).overlap(ours) is not None) == bool(shared or whole)
