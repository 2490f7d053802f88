"""What a dry run finds in the data: everything that the start refuses, in its words, and what becomes of the rest."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_grit.cli import train
from megatron_grit.config.kinds import option
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.builders.grit_builder import Limits, build_grit
from megatron_grit.data.chat import run_chat
from megatron_grit.data.chat.chat import Chat, named_chat, write_chat
from megatron_grit.data.chat.run_chat import unlike_base
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows import prospects
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.errors import ConfigError, GritError
from megatron_grit.parallel.devices import device_errors, select_device
from tests.unit.data.indexed_files import TOKENIZER, pair, run_config, text, write, write_chats

CHAT: Any = Chat(template="gritlm", source={}, end_ids=(), origin="default")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Texts of 2 to 100 tokens; 30 pairs without negatives; 8 with one, of which half are long."""
    folder = tmp_path_factory.mktemp("prospects")
    pairs = [pair(number, number) for number in range(30)]
    long = [pair(number, number, 99, length=6 if number % 2 else 90) for number in range(8)]
    return {
        "texts": write(folder / "texts", [text(number, number) for number in range(2, 101)], RowKind.GENERATIVE),
        "pairs": write(folder / "pairs", pairs, RowKind.EMBEDDING),
        "long": write(folder / "long", long, RowKind.EMBEDDING),
        "chats": write_chats(folder / "chats", [[2, 3]] * 10),
    }


def lines(config: RunConfig) -> list[str]:
    assert not list(prospects.data_errors(config, TOKENIZER))
    return list(prospects.prospects(config, TOKENIZER, CHAT))


def test_everything_that_the_start_refuses(files: dict[str, str], tmp_path: Path) -> None:
    """The first of it is what the loader says."""
    config = run_config(
        tmp_path,
        objective="unified",
        embedding=[files["pairs"], files["long"], files["texts"], str(tmp_path / "none")],
        generative=[files["texts"]],
        train_group_size=2,
        training={"embedding_batch_size": 9},
    )
    found = [str(error) for error in prospects.data_errors(config, TOKENIZER)]
    with pytest.raises(GritError) as first:
        GritDataLoader(config, TOKENIZER)
    assert str(first.value) == found[0]
    for message in (
        f"data.train_group_size 2 needs negatives, and {files['pairs']} has records without any",
        f"source {files['long']} has 8 records, fewer than training.embedding_batch_size 9",
        "has a segment of 92 tokens, more than data.tokens_per_row 64",
        "texts.json: holds generative records and stands under data.embedding",
        "none.json: no such file",
        "has a segment of 100 tokens, more than data.tokens_per_row 64",
    ):
        assert sum(message in line for line in found) == 1, found
    assert len(found) == 6


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("drop", "data.over_long drop leaves them out, 59 % of the tokens"),
        ("truncate", "data.over_long truncate cuts off their end, 13 % of the tokens"),
        ("split", "data.over_long split cuts them into pieces"),
    ],
)
def test_records_longer_than_rows(files: dict[str, str], tmp_path: Path, policy: str, said: str) -> None:
    """36 texts, of 65 to 100 tokens, are above 64: 2,970 of 5,049 tokens, 666 of them beyond the 64th of each."""
    config = run_config(tmp_path, generative=[files["texts"]], over_long=policy, training={"steps": 30})
    assert lines(config) == [
        "data.generative: 30 steps of 8 records are 2.42 epochs of its 99 records",
        f"{files['texts']}: 36 of 99 records are longer than data.tokens_per_row 64, the longest has 100 tokens: "
        + said,
    ]


def test_texts_longer_than_rows_and_a_bounded_look(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28 of the 92 tokens of 4 passages, of 456."""
    data = {"embedding": [files["long"]], "over_long_texts": "truncate", "train_group_size": 2}
    config = run_config(tmp_path, objective="embedding", training={"steps": 4}, **data)
    assert lines(config)[1] == (
        f"{files['long']}: 4 of 24 texts are longer than data.tokens_per_row 64, the longest has 92 tokens: "
        "data.over_long_texts truncate cuts off their end, 25 % of the tokens"
    )
    monkeypatch.setattr(prospects, "_BLOCKS", 2)
    monkeypatch.setattr(prospects, "_RECORDS_OF_BLOCK", 10)
    seen: list[int] = []
    monkeypatch.setattr(IndexedRecords, "tokens", lambda *_: pytest.fail("a token was read"))
    extents = prospects._lengths
    monkeypatch.setattr(prospects, "_lengths", lambda source, some: (seen.append(len(some)), extents(source, some))[1])
    long = run_config(tmp_path, generative=[files["texts"]], over_long="drop")
    assert "10 of 20 records that were looked at (50 %) are longer" in lines(long)[1] and seen == [20]


def test_epochs(files: dict[str, str], tmp_path: Path) -> None:
    blend = [f"0.75 {files['texts']} 0.25 {files['chats']}"]
    config = run_config(tmp_path, generative=blend, tokens_per_row=128, training={"steps": 10})
    assert lines(config) == [
        f"data.generative: 10 steps of 8 records are 0.734 epochs of its 109 records, from 0.606 of {files['texts']} "
        f"to 2 of {files['chats']}"
    ]
    small = run_config(tmp_path, generative=[files["chats"]], training={"steps": 2, "generative_batch_size": 40})
    assert lines(small)[0].endswith(
        "8 epochs of its 10 records; a step takes more than there are, so each record comes 4 times in every step"
    )
    window = run_config(
        tmp_path, generative=[files["chats"]], packing="window", training={"steps": 5, "generative_rows": 2}
    )
    assert lines(window)[0].startswith(
        "data.generative: 5 steps of 128 tokens are 12.8 epochs of its 50 tokens; a step takes more than there are"
    )
    queries = run_config(tmp_path, objective="embedding", embedding=[files["pairs"]], training={"steps": 15})
    assert lines(queries) == ["data.embedding: 15 steps of 4 records are 2 epochs of its 30 records"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_dry_run_tells_data_devices_and_port_at_once(
    indexed_prefixes: dict[str, str],
    tokenizer_path: Path,
    tmp_path: Path,
    taken_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", "tiny_mistral", "--data.tokenizer", str(tokenizer_path), "--output_dir", str(tmp_path)]
    given += ["--training.objective=embedding", f"--data.embedding=[{indexed_prefixes['no_neg']}]", "--dry-run"]
    enough = ["--training.embedding_batch_size=8", "--data.train_group_size=1", "--training.steps=10"]
    assert train.main([*given, *enough]) == 0
    said = capsys.readouterr().out
    assert "\n# data.embedding: 10 steps of 8 records are 2 epochs of its 40 records\n" in said
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    for name, content in (("state.json", "{}"), ("config.yaml", said)):
        (tmp_path / "checkpoints" / "step_00000010" / name).write_text(content)
    assert train.main([*given, *enough]) == 0
    said = f"\n# {tmp_path} is finished: its newest checkpoint is of step 10, and training.steps is 10. Nothing to do; "
    assert said in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4), ("MASTER_PORT", taken_port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert train.main([*given, "--training.embedding_batch_size=64"]) == 2
    said = capsys.readouterr().err
    for message in (
        "4 processes on this node need a GPU each, but torch finds 2",
        f"MASTER_PORT {taken_port} is taken on this node; choose another one",
        "has 40 records, fewer than training.embedding_batch_size 64",
        "data.train_group_size 2 needs negatives",
    ):
        assert said.count(message) == 1, said
    assert len(said.splitlines()) == 4


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (error,) = device_errors("cuda", "--device")
    assert str(error) == "--device is cuda, but torch finds no GPU; use auto or cpu"
    with pytest.raises(type(error), match="--device is cuda"):
        select_device("cuda", "--device")
    assert not device_errors("auto") and not device_errors("cpu")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert not device_errors("cuda"), "planned for other machines"


@pytest.mark.parametrize("template", ["gritlm", "zephyr"])
def test_a_base_of_another_tokenizer_or_template(
    files: dict[str, str], tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base like the run is passed over in silence."""
    words = [f"word{number} number {number * 7}" for number in range(300)]
    for name, size in (("base", 300), ("own", 290)):
        (tmp_path / name).mkdir()
        train_sentencepiece(words, tmp_path / name / "tokenizer", size)
    base, own = (load_tokenizer(tmp_path / name) for name in ("base", "own"))
    chat = named_chat(template, base, "data.chat_template")
    write_chat(chat, tmp_path / "base")
    config = run_config(tmp_path, generative=[files["texts"]])
    config.checkpoint.load = str(tmp_path / "base")
    assert list(unlike_base(config, base, chat)) == []
    (other,) = unlike_base(config, base, named_chat("chatml", base, "data.chat_template"))
    here = "chatml, from data.chat_template"
    assert other == f"warning: the base converses in {template} ({tmp_path / 'base'}), this run in {here}"
    (line,) = unlike_base(config, own, chat)
    number = next(index for index in range(290) if base.id_to_token(index) != own.id_to_token(index))
    assert line == (
        f"warning: data.tokenizer is another than the base's, which knows other words: id {number} is "
        f"{base.id_to_token(number)!r} in {base.path} and {own.id_to_token(number)!r} in {own.path}"
    )
    # A name on the hub is looked at where it was fetched to; one that is not there any more is passed over.
    config.checkpoint.load, config.model.pretrained = None, "some/base"
    monkeypatch.setattr(run_chat, "local_folder", lambda name, weights: tmp_path / name.partition("/")[2])
    assert list(unlike_base(config, own, chat)) == [line]
    config.model.pretrained = "some/gone"
    assert list(unlike_base(config, own, chat)) == []


def test_a_reward_model_is_told_of_answers_that_were_cut(
    write_jsonl: Callable[..., Path], tokenizer_path: Path, tmp_path: Path
) -> None:
    """Not of those that end at the limit, or are ended there."""
    pairs = [{"prompt": "a", "chosen": "one two " * 40, "rejected": f"two {number}"} for number in range(3)]
    path = write_jsonl([*pairs, {"prompt": "a", "chosen": "yes", "rejected": "no"}])
    said = {}
    for over_long, limit in (("truncate", 24), ("terminate", 24), ("truncate", 2048)):
        prefix = str(tmp_path / f"{over_long} {limit}")
        limits = Limits(generative=limit)
        build_grit([path], prefix, tokenizer_path, kind=RowKind.PREFERENCE, limits=limits, over_long=over_long)
        config = run_config(tmp_path, objective="reward", tokens_per_row=4096)
        option(config, "reward").data = [prefix]
        tokenizer = load_tokenizer(tokenizer_path)
        told = prospects.prospects(config, tokenizer, CHAT)
        said[over_long, limit] = [line for line in told if line.startswith("warning")]
    assert said.pop(("truncate", 24)) == [
        "warning: reward.data: 3 of 8 answers that were looked at were cut at --generative-max-len when they were "
        f"built, as in {tmp_path / 'truncate 24'}: they have no end, at which they would be read; build them with a "
        "larger one, or with --over-long drop or terminate"
    ]
    assert not any(said.values())


def test_records_that_are_all_longer_than_rows(files: dict[str, str], tmp_path: Path) -> None:
    """Refused in a line that the dry run and the start share; one short record in any source is enough."""
    long = write(tmp_path / "long", [text(number, 70 + number) for number in range(3)], RowKind.GENERATIVE)
    short = write(tmp_path / "short", [text(9, 64)], RowKind.GENERATIVE)
    for names, drops in (([long], True), ([long, short], False), ([files["texts"]], False)):
        config = run_config(tmp_path, generative=names, over_long="drop", training={"generative_batch_size": 1})
        found = [str(error) for error in prospects.data_errors(config, TOKENIZER)]
        assert found == drops * [
            "data.generative: all 3 records are longer than data.tokens_per_row 64, the shortest has 70 tokens, and "
            "data.over_long drop leaves none; raise it, or set data.over_long to truncate or split"
        ]
        if drops:
            with pytest.raises(ConfigError) as caught:
                GritDataLoader(config, TOKENIZER)
            assert str(caught.value) == found[0]
