"""Mixtures: how many records of each source, which of them, words that drop one, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.cli.main import main
from megatron_grit.data.builders.options import SftConversion, SftMixture
from megatron_grit.data.builders.sources.instructions import SOURCES, convert_sft
from megatron_grit.data.builders.sources.mixture import MIXTURES, VENDOR_WORDS, MixtureCounts, mix_sft, read_mixture
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.builders.raw_sets import EXPECTED, write_raw


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten records of a, four of b and three of c."""
    folder = tmp_path / "sources"
    for name, count in (("a", 10), ("b", 4), ("c", 3)):
        path = folder / "c" / "c_data.jsonl" if name == "c" else folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(record(f"{name}{number}") for number in range(count)) + "\n\n")
    return folder


def record(name: str, answer: str = "yes") -> str:
    turns = [{"role": "user", "content": name}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": name, "about": "OpenAI", "messages": turns})


def mix(folder: Path, *mixture: str, **options: Any) -> tuple[MixtureCounts, list[str]]:
    output = folder.parent / "out.jsonl"
    counts = mix_sft(SftMixture(mixture=list(mixture), input=str(folder), output=str(output), **options))
    return counts, [json.loads(line)["id"] for line in output.read_text().splitlines()]


def test_amounts(folder: Path) -> None:
    """A count, a fraction and epochs; each pass holds no record twice, in the order of the file."""
    counts, ids = mix(folder, "a", "3", "b", "2.5", "c", "1.0")
    assert counts.taken == {"a": 3, "b": 10, "c": 3} == Counter(name[0] for name in ids)
    assert ids == [*ids[:3], *(["b0", "b1", "b2", "b3"] * 2), *ids[11:13], "c0", "c1", "c2"]
    for part in (ids[:3], ids[11:13]):
        assert part == sorted(set(part))
    assert mix(folder, "a", "3", "b", "2.5", "c", "1.0")[1] == ids
    assert mix(folder, "a", "0.5")[0].taken == {"a": 5}
    assert len({tuple(mix(folder, "a", "3", seed=seed)[1]) for seed in range(8)}) > 4
    alone = mix(folder, "b", "4", "a", "3")[1]
    assert alone[4:] == ids[:3], "what is drawn of a source does not depend on the others"


def test_every_record_is_as_likely(folder: Path) -> None:
    """Within 5 standard deviations of 400 seeds."""
    drawn = Counter(name for seed in range(400) for name in mix(folder, "a", "3", seed=seed)[1])
    assert len(drawn) == 10
    assert all(abs(count - 120) < 5 * (400 * 0.3 * 0.7) ** 0.5 for count in drawn.values())


def test_files(folder: Path, tmp_path: Path) -> None:
    """A list of names with amounts, and YAML, say the same as the command line."""
    (tmp_path / "mix.txt").write_text("a 3\n\nb 2.5\n")
    (tmp_path / "mix.yaml").write_text("- {name: a, count: 3}\n- name: b\n  epochs: 2.5\n")
    expected = mix(folder, "a", "3", "b", "2.5")
    assert mix(folder, str(tmp_path / "mix.txt")) == expected
    assert mix(folder, str(tmp_path / "mix.yaml")) == expected
    (tmp_path / "mix.yaml").write_text("sources:\n- {name: a, cap: 4}\n- {name: b, cap: 9}\n- c\n")
    assert mix(folder, str(tmp_path / "mix.yaml"))[0].taken == {"a": 4, "b": 4, "c": 3}
    (tmp_path / "mix.yaml").write_text("- {name: a, share: 0.2}\n- {name: b, share: 0.3}\n")
    assert mix(folder, str(tmp_path / "mix.yaml"), total=5)[0].taken == {"a": 2, "b": 3}


@pytest.mark.parametrize(("match", "dropped"), [("substring", ["x1", "x3"]), ("word", ["x1"])])
def test_records_are_dropped_for_their_words(folder: Path, match: str, dropped: list[str]) -> None:
    """Of messages, not of other keys, whatever the case; a part of a word only where that is asked for."""
    answers = ["yes", "I am bArD.", "no", "unBARDed", "gpt"]
    (folder / "x.jsonl").write_text("".join(record(f"x{k}", text) + "\n" for k, text in enumerate(answers)))
    (folder / "y.jsonl").write_text((folder / "x.jsonl").read_text())
    (folder / "mix.yaml").write_text(
        f"match: {match}\ndrop_words: [bard, gpt-4, OpenAI]\nsources: [x, {{name: y, unfiltered: true}}]\n"
    )
    counts, ids = mix(folder, str(folder / "mix.yaml"))
    everything = [f"x{k}" for k in range(5)]
    assert ids == [name for name in everything if name not in dropped] + everything
    assert (counts.dropped, counts.taken) == (len(dropped), {"x": 5 - len(dropped), "y": 5})
    assert f"{len(dropped)} were dropped" in counts.summary()


def test_a_vendor_in_the_name_of_a_data_set_drops_nothing(folder: Path) -> None:
    texts = [{"id": f"gpt4_{k}", "dataset": "gpt4_alpaca", "prompt": "say", "completion": k} for k in ("no", "gpt4")]
    (folder / "x.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*texts, {"id": "o", "messages": 5}]))
    (folder / "mix.yaml").write_text("drop_words: [gpt4]\nsources: [x]\n")
    counts, ids = mix(folder, str(folder / "mix.yaml"))
    assert (counts.dropped, ids) == (1, ["gpt4_no", "o"])


@pytest.mark.parametrize("total", [1, 4, 7, 8])
def test_shares_make_up_their_total(folder: Path, total: int) -> None:
    (folder / "mix.yaml").write_text("".join(f"- {{name: {name}, share: 0.3333}}\n" for name in "abc"))
    counts, ids = mix(folder, str(folder / "mix.yaml"), total=total)
    assert len(ids) == total and max(counts.taken.values()) - min(counts.taken.values()) <= 1


@pytest.mark.parametrize("name", ["tulu-v1", "tulu-v2"])
def test_published_mixtures_of_what_the_table_converts(name: str, tmp_path: Path) -> None:
    sources = [entry.name for entry in MIXTURES[name].entries]
    assert set(sources) <= set(SOURCES)
    for source in sources:
        raw = write_raw(tmp_path / "raw", source)
        convert_sft(SftConversion(source=source, input=str(raw), output=str(tmp_path / "sft" / f"{source}.jsonl")))
    counts, _ = mix(tmp_path / "sft", name)
    expected = {source: len(EXPECTED[source]) * (10 if source == "hard_coded" else 1) for source in sources}
    assert counts.taken == expected and len(sources) == {"tulu-v1": 7, "tulu-v2": 11}[name]


def test_published_amounts() -> None:
    """Caps and repetitions of Tulu 2, the number of words, and shares of FLAN that sum to one."""
    tulu = {entry.name: entry for entry in MIXTURES["tulu-v2"].entries}
    caps = {name: entry.cap for name, entry in tulu.items() if entry.cap}
    assert caps == {"flan_v2": 50_000, "cot": 50_000, "gpt4_alpaca": 20_000, "wizardlm": 30_000, "open_orca": 30_000}
    assert (tulu["hard_coded"].epochs, tulu["hard_coded"].unfiltered, len(VENDOR_WORDS)) == (10, True, 22)
    for name, count in (("flan-v1", 14), ("flan-v2", 6)):
        shares = [entry.share or 0.0 for entry in MIXTURES[name].entries]
        assert len(shares) == count and abs(sum(shares) - 1) < 1e-9


def test_an_absent_source_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["mix-sft", "--mixture", "a", "3", "gone", "1.0", "--input", str(folder), "--output", str(folder / "o")]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    assert f"{folder}: mixture takes gone, and there is neither gone.jsonl" in message
    assert "--without gone" in message and not (folder / "o").exists()
    assert main([*argv, "--without", "gone"]) == 0
    assert len((folder / "o").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- {name: b, amount: 3}\n", r"mix.yaml:2: unknown key amount; a source has name, count"),
        ("- a\n- {name: b, count: 0.5}\n", r"mix.yaml:2: count of b must be a positive whole number, not 0.5"),
        ("- {name: b, fraction: 1.5}\n", r"mix.yaml:1: fraction of b must be above 0 and at most 1"),
        ("- {name: b, epochs: .inf}\n", r"epochs of b must be a positive number"),
        ("- {name: b, epochs: 1, cap: 3}\n", r"mix.yaml:1: b has epochs and cap; give one amount"),
        ("- {name: b, unfiltered: 3}\n", r"unfiltered of b must be true or false"),
        ("- {count: 3}\n", r"mix.yaml:1: expected a name, or a mapping with name"),
        ("- a\n- a\n", r"mix.yaml: a is named twice"),
        ("- {name: a, share: 0.5}\n- b\n", r"b has no share and others have"),
        ("- {name: a, share: 0.5}\n", r"has shares; give their total"),
        ("- {name: b, count: 5}\n", r"b.jsonl: has 4 records, and 5 are asked for; give epochs"),
        ("sources: []\n", r"expected a list of sources"),
        ("drop_words: bard\nsources: [a]\n", r"mix.yaml:1: expected sources, drop_words"),
        ("drop_words: ['']\nsources: [a]\n", r"mix.yaml:1: expected sources, drop_words"),
        ("- {name: a\n", r"mix.yaml:\d"),
    ],
)
def test_what_a_file_may_not_say(folder: Path, text: str, message: str) -> None:
    (folder / "mix.yaml").write_text(text)
    with pytest.raises((ConfigError, DataError), match=message):
        mix(folder, str(folder / "mix.yaml"))


def test_what_a_command_line_may_not_say(folder: Path) -> None:
    for items, message in (
        (["tulu-v3"], "'tulu-v3' is no known one.*tulu-v"),
        (["a", "3", "b"], "is no known one; there are tulu-v1, tulu-v2"),
        (["a", "many"], "many behind a is no amount; give 500, or 0.5 or 2.0"),
        (["a", "0"], "count of a must be a positive whole number, not 0"),
        (["a", "nan.0"], "nan.0 behind a is no amount"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_mixture(items)
    (folder / "mix.txt").write_text("a 3\nb\n")
    with pytest.raises(ConfigError, match=r"mix.txt:2: expected a name and an amount, found 1 words"):
        read_mixture([str(folder / "mix.txt")])
    with pytest.raises(ConfigError, match="without names z, which is not in mixture: a"):
        mix(folder, "a", "1", without=["z"])
    with pytest.raises(ConfigError, match="has no shares; leave total out"):
        mix(folder, "a", "1", total=3)
