"""Completions as text or tokens to an indexed file with what is known beside it, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.indexed.rollouts import Rollouts, side_paths
from megatron_grit.data.rollouts.build import build_rollouts
from megatron_grit.data.rollouts.options import RolloutBuild
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.errors import DataError, GritError

ASKED = {"messages": [{"role": "user", "content": "two plus two"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(["two plus two is four", "it is five or six"] * 20, folder / "tokenizer", 290)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer.model")


def built(folder: Path, output: Path, lines: list[dict[str, Any]], **options: Any) -> tuple[Any, Path]:
    path, prefix = output / "in.jsonl", output / "rollouts"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"template": "tulu", "overwrite": True} | options
    return build_rollouts([path], prefix, RolloutBuild(tokenizer=str(folder), **options)), prefix


def test_tokens_are_taken_as_they_were_sampled(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = [*tokenizer.encode("four"), tokenizer.eos_id]
    log_probs = [-0.25 * place for place in range(len(ids))]
    line = ASKED | {
        "prompt_token_ids": [1, 7, 9],
        "completions": [
            {"text": "four", "token_ids": ids, "logprobs": log_probs, "reward": 1},
            {"text": "", "token_ids": [5], "logprobs": [-2.0], "reward": 0.5},
            {"text": "", "token_ids": [], "logprobs": [], "reward": 0.5},
        ],
    }
    report, prefix = built(folder, tmp_path, [line])
    assert (report.num_completions, report.num_empty, report.has_log_probs) == (2, 1, True)
    records = IndexedRecords(prefix)
    spans = records.get(0)
    assert [role for role, _ in spans] == [Role.TEMPLATE, Role.ANSWER]
    assert [ids.tolist() for _, ids in spans] == [[1, 7, 9], ids]
    known = Rollouts(records, "mean")
    assert known.rewards_R.tolist() == [1, 0.5] and known.advantages_R.tolist() == [0.25, -0.25]
    behavior = known.behavior(0, 0, 3 + len(ids))
    assert np.isnan(behavior[:3]).all() and behavior[3:].tolist() == pytest.approx(log_probs)
    assert known.behavior(1, 3, 4).tolist() == [-2.0]


def test_ids_of_another_tokenizer_are_found_behind_right_ones(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    train_sentencepiece(["it is five or six", "nor is it four"] * 20, tmp_path / "other", 290)
    other = load_tokenizer(tmp_path / "other.model")

    def line(by: Tokenizer, text: str) -> dict[str, Any]:
        said = {"text": text, "token_ids": [*by.encode(text), by.eos_id], "reward": 1}
        return ASKED | {"prompt_token_ids": [1, 7], "completions": [said]}

    with pytest.raises(DataError, match="in.jsonl:18: token_ids are of another tokenizer than .*: they say "):
        built(folder, tmp_path, [line(tokenizer, "it is four")] * 17 + [line(other, "it is four")])


def test_samplers_may_write_less_than_they_sampled(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = [*tokenizer.encode("it is\nfour or ö"), tokenizer.eos_id]
    whole = {"token_ids": ids, "reward": 1}
    cut = {"token_ids": ids[:-2], "reward": 0}
    texts = ("", "it is", " four or ö", "it is\n\nfour or ö</s>")
    said = [whole | {"text": text} for text in texts]
    said += [cut | {"text": text} for text in ("it is four or", "it is four or \ufffd", "it is four or \ufffd\ufffd")]
    report, _ = built(folder, tmp_path, [ASKED | {"prompt_token_ids": [1], "completions": said}])
    assert report.num_completions == len(said)


def test_the_template_of_a_checkpoint(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from megatron_grit.data.chat.chat import named_chat, write_chat

    lines = [ASKED | {"completions": [{"text": "four", "reward": 1}, {"text": "six", "reward": 0}]}]
    _, prefix = built(folder, tmp_path, lines, template="zephyr")
    expected = prefix.with_suffix(".bin").read_bytes()
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    write_chat(named_chat("zephyr", tokenizer, "data.chat_template"), tmp_path)
    _, prefix = built(tmp_path, tmp_path, lines, template="tokenizer")
    assert prefix.with_suffix(".bin").read_bytes() == expected
    with pytest.raises(DataError, match="no chat_template"):
        built(folder, tmp_path, lines, template="tokenizer")


def test_the_tokenizer_of_a_run(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    lines = [{"prompt": "two", "completions": [{"text": "four", "reward": 1}, {"text": "six", "reward": 0}]}]
    _, prefix = built(folder, tmp_path, lines)
    expected = prefix.with_suffix(".bin").read_bytes()
    for path in (tmp_path / "run", checkpoint):
        _, prefix = built(path, tmp_path, lines)
        assert prefix.with_suffix(".bin").read_bytes() == expected


def test_text_is_tokenised_as_it_is_for_tuning(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from megatron_grit.data.text.records import Message
    from megatron_grit.data.text.templates import encode_chat, encode_prompt

    lines = [
        ASKED
        | {"completions": [{"text": "four", "reward": 1}, {"text": "five", "reward": 0, "finish_reason": "length"}]},
        {"prompt": "two plus two is", "completions": [{"text": "four", "reward": 1}, {"text": "six", "reward": 1}]},
    ]
    report, prefix = built(folder, tmp_path, lines)
    assert (report.num_prompts, report.num_equal_prompts, report.has_log_probs) == (2, 1, False)
    records = IndexedRecords(prefix)
    messages = [Message("user", "two plus two"), Message("assistant", "four")]
    whole = [index for _, ids in encode_chat(tokenizer, messages, template="tulu") for index in ids]
    prompt = encode_prompt(tokenizer, messages[:1], "tulu")
    (_, first), (_, sampled) = records.get(0)
    assert [*first, *sampled] == whole and first.tolist() == prompt and sampled[-1] == tokenizer.eos_id
    assert records.get(1)[1][1][-1] != tokenizer.eos_id, "what was cut off has no end"
    assert tokenizer.decode(records.get(2)[0][1].tolist()) == "two plus two is"
    known = Rollouts(records, "std")
    assert not known.has_behavior and known.advantages_R[2:].tolist() == [0, 0]
    with pytest.raises(DataError, match="holds no log-probabilities"):
        known.behavior(0, 0, 1)
    report, prefix = built(folder, tmp_path, lines, drop_equal=True)
    assert report.num_completions == len(IndexedRecords(prefix)) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"completions": ["a"]}, r'in.jsonl:1: needs "prompt", a text, or "messages"'),
        (ASKED, 'in.jsonl:1: needs "completions"'),
        (ASKED | {"completions": []}, 'needs "completions"'),
        (ASKED | {"completions": ["a"]}, "a completion has no reward; megatron-grit rollouts --completions FILE"),
        (ASKED | {"completions": [{"text": "a", "reward": "1"}]}, "completion 1: reward must be a number, not '1'"),
        (ASKED | {"completions": [{"text": "a", "reward": True}, 5]}, "completion 2 must be a text or an object"),
        (ASKED | {"completions": [{"reward": 1}]}, "completion 1: text"),
        (ASKED | {"completions": [{"text": "a", "token_ids": [-1]}]}, "token_ids must be a list of ids"),
        (ASKED | {"completions": [{"text": "a", "token_ids": [1], "logprobs": [0.5]}]}, "number 0 is 0.5; a log-prob"),
        (
            ASKED | {"completions": [{"text": "a", "token_ids": [1], "logprobs": [None]}]},
            "is null; .*leave logprobs out",
        ),
        (
            ASKED | {"completions": [{"text": "a", "token_ids": [1, 2], "logprobs": [-1, -9999.0]}]},
            "in.jsonl:1: completion 1: logprobs: number 1 is -9999.0; no token is sampled at less than -80",
        ),
        (ASKED | {"completions": ["a"], "temperature": "1"}, "temperature must be that of the completions, a number"),
        (ASKED | {"completions": [{"text": "a", "token_ids": [1], "logprobs": []}]}, "0 logprobs for 1 token_ids"),
        (
            ASKED | {"prompt_token_ids": [1], "completions": [{"text": "a", "token_ids": [400], "reward": 1}]},
            "token_ids are of another tokenizer than .*: it has 290 tokens, here is 400",
        ),
        (
            ASKED | {"prompt_token_ids": [1], "completions": [{"text": "four", "token_ids": [70, 71], "reward": 1}]},
            r"in.jsonl:1: token_ids are of another tokenizer than .*: they say 'BC', and the text is 'four'",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "must end with the user",
        ),
        (ASKED | {"completions": [{"text": "a", "reward": 1}] * 2, "drop": True}, "nothing is left to train on"),
    ],
)
def test_lines_that_are_none(folder: Path, tmp_path: Path, line: dict[str, Any], says: str) -> None:
    with pytest.raises(GritError, match=says) as error:
        built(folder, tmp_path, [line], drop_equal=line.get("drop", False))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "rollouts.json").exists()


def test_what_stands_beside_other_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    lines = [ASKED | {"completions": [{"text": text, "reward": len(text)} for text in ("four", "six")]}]
    _, prefix = built(folder, tmp_path, lines)
    completions, _, described = side_paths(prefix)
    content = completions.read_bytes()
    completions.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"rollouts.completions.npy: cannot be read \(does not match its checksum\)"):
        Rollouts(IndexedRecords(prefix), "std")
    completions.write_bytes(content)
    (tmp_path / "other").mkdir()
    _, other = built(folder, tmp_path / "other", [lines[0] | {"prompt": None} | ASKED, lines[0]])
    described.write_bytes(side_paths(other)[2].read_bytes())
    with pytest.raises(DataError, match="is of other completions than .*rollouts: bin_sha256 is"):
        Rollouts(IndexedRecords(prefix), "std")
    described.unlink()
    with pytest.raises(DataError, match="is missing, so .*rollouts has no rewards; write it with megatron-grit"):
        Rollouts(IndexedRecords(prefix), "std")
