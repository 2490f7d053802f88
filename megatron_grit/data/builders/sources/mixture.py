"""Mixtures of JSONL files: how many records of each, drawn by a seed, and words for which a record is dropped.

A list has a name and an amount for each source. An amount is a count (``500``), a fraction or number of epochs
(``0.5``, ``2.0``), a cap, which is as many as there are and at most so many, or a share of a total.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from megatron_grit.config.commands import suggestion
from megatron_grit.config.locate import yaml_file
from megatron_grit.data.builders.options import SftMixture
from megatron_grit.data.chat.message_keys import strings
from megatron_grit.data.text.lines import Line, filled_lines, read_lines
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.files import check_output, replacing
from megatron_grit.store.progress import Progress

_AMOUNTS = ("count", "fraction", "epochs", "cap", "share")
_FACTS = ("dataset", "id", "source")
"""Keys of a record that say where it is from."""
_KEYS = ("name", *_AMOUNTS, "unfiltered")
_FORMS = (
    "{name}",
    "{name}.jsonl",
    "{name}.jsonl.gz",
    "{name}.jsonl.zst",
    "{name}_data.jsonl",
    "{name}/{name}_data.jsonl",
)
"""Where a source lies in the folder; the first file that is there is taken."""


@dataclass(frozen=True, kw_only=True)
class MixtureEntry:
    """A source and how much of it. At most one amount; none: all, once."""

    name: str
    count: int | None = None
    """Records, no more than there are."""
    fraction: float | None = None
    """Of the records, at most 1."""
    epochs: float | None = None
    """Times that all of them are taken; of a part of one the records are drawn."""
    cap: int | None = None
    """Most records."""
    share: float | None = None
    """Of the mixture's total."""
    unfiltered: bool = False
    """Its records are not dropped for words."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources, in their order."""

    entries: tuple[MixtureEntry, ...]
    drop_words: tuple[str, ...] = ()
    """A record in whose messages one stands is dropped, whatever its case."""
    match: Literal["substring", "word"] = "substring"
    """Whether a part of a word counts."""


VENDOR_WORDS = (
    *("openai", "open ai", "chatgpt", "chat gpt", "gpt-3", "gpt3", "gpt 3", "gpt-3.5", "gpt3.5", "gpt 3.5"),
    *("gpt-4", "gpt4", "gpt 4", "bingchat", "bing chat", "bard", "palm", "anthropic", "claude", "laion"),
    *("open assistant", "openassistant"),
)
"""Vendors and products in whose name a model should not speak."""


def _flan(shares: dict[str, float]) -> Mixture:
    return Mixture(entries=tuple(MixtureEntry(name=name, share=share) for name, share in shares.items()))


MIXTURES: dict[str, Mixture] = {
    "tulu-v1": Mixture(
        entries=tuple(
            MixtureEntry(name=name)
            for name in ("flan_v2", "cot", "oasst1", "dolly", "gpt4_alpaca", "code_alpaca", "sharegpt")
        )
    ),
    "tulu-v2": Mixture(
        entries=(
            MixtureEntry(name="flan_v2", cap=50_000),
            MixtureEntry(name="cot", cap=50_000),
            MixtureEntry(name="oasst1"),
            MixtureEntry(name="sharegpt"),
            MixtureEntry(name="gpt4_alpaca", cap=20_000),
            MixtureEntry(name="code_alpaca"),
            MixtureEntry(name="lima"),
            MixtureEntry(name="wizardlm", cap=30_000),
            MixtureEntry(name="open_orca", cap=30_000),
            MixtureEntry(name="hard_coded", epochs=10, unfiltered=True),
            MixtureEntry(name="science"),
        ),
        drop_words=VENDOR_WORDS,
    ),
    "flan-v1": _flan(
        dict.fromkeys((f"flan_{shots}_{options}" for shots in ("zs", "fs") for options in ("opt", "noopt")), 0.1)
        | dict.fromkeys((f"t0_{shots}_{options}" for shots in ("zs", "fs") for options in ("opt", "noopt")), 0.08)
        | dict.fromkeys(("niv2_zs_opt", "niv2_fs_opt"), 0.1)
        | dict.fromkeys(("cot_zs_opt", "cot_fs_opt"), 0.025)
        | dict.fromkeys(("dialog_zs_opt", "dialog_fs_opt"), 0.015)
    ),
    "flan-v2": _flan(
        dict.fromkeys(("flan_fs_opt", "flan_fs_noopt"), 0.2)
        | dict.fromkeys(("t0_fs_opt", "t0_fs_noopt"), 0.16)
        | {"niv2_fs_opt": 0.23, "cot_fs_opt": 0.05}
    ),
}
"""Tulu 1 and 2 (arXiv 2306.04751, 2311.10702), and the proportions by which their part of FLAN was drawn."""


@dataclass
class MixtureCounts:
    """What a mixture took."""

    taken: dict[str, int] = field(default_factory=dict)
    """Records by source."""
    dropped: int = 0
    """Records with a word that drops them."""

    def summary(self) -> str:
        """One line for a terminal."""
        parts = ", ".join(f"{name} {count}" for name, count in self.taken.items())
        dropped = f"; {self.dropped} were dropped for their words" if self.dropped else ""
        return f"{sum(self.taken.values())} records: {parts}{dropped}"


def read_mixture(items: Sequence[str]) -> tuple[str, Mixture]:
    """A mixture's name and what it says.

    Args:
        items: the name of a table; a ``.yaml`` file; a ``.txt`` file with a name and an amount a line; or names and
            amounts in turn.

    Raises:
        ConfigError: anything else; names file and line.
    """
    first = items[0]
    if len(items) == 1 and first in MIXTURES:
        return first, MIXTURES[first]
    if len(items) == 1 and first.endswith((".yaml", ".yml")):
        return first, _read_yaml(first)
    if len(items) == 1 and first.endswith(".txt"):
        entries = []
        for line in filled_lines(first):
            words = line.text().split()
            if len(words) != 2:
                raise ConfigError(f"{first}:{line.number}: expected a name and an amount, found {len(words)} words")
            entries.append(_pair(words[0], words[1], f"{first}:{line.number}"))
        return first, _checked(entries, first)
    if len(items) % 2:
        hint = suggestion(first, MIXTURES) or f"; there are {', '.join(MIXTURES)}"
        raise ConfigError(
            f"mixture {' '.join(items)!r} is no known one{hint}; or give a .yaml or .txt file, or names with amounts"
        )
    pairs = zip(items[::2], items[1::2], strict=True)
    return "mixture", _checked([_pair(name, amount, "mixture") for name, amount in pairs], "mixture")


def _pair(name: str, amount: str, where: str) -> MixtureEntry:
    try:
        number = float(amount) if "." in amount else int(amount)
    except ValueError:
        raise ConfigError(f"{where}: {amount} behind {name} is no amount; give 500, or 0.5 or 2.0") from None
    return _amount(name, "epochs" if "." in amount else "count", number, where)


def _amount(name: str, kind: str, number: Any, where: str, *, unfiltered: bool = False) -> MixtureEntry:
    whole = kind in ("count", "cap")
    known = isinstance(number, int) if whole else isinstance(number, int | float)
    limit = 1.0 if kind in ("fraction", "share") else float(1 << 53)
    if isinstance(number, bool) or not known or not 0 < number <= limit:
        what = "a positive whole number" if whole else "above 0 and at most 1" if limit == 1 else "a positive number"
        raise ConfigError(f"{where}: {kind} of {name} must be {what}, not {number!r}")
    return MixtureEntry(name=name, unfiltered=unfiltered, **{kind: number})


def _checked(entries: list[MixtureEntry], where: str, **facts: Any) -> Mixture:
    if not entries:
        raise ConfigError(f"{where}: names no source")
    names = [entry.name for entry in entries]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ConfigError(f"{where}: {twice} is named twice; give it once, with epochs: 2.0 for all of it twice")
    shared = [entry.share is not None for entry in entries]
    if any(shared) and not all(shared):
        raise ConfigError(f"{where}: {names[shared.index(False)]} has no share and others have; give all one, or none")
    return Mixture(entries=tuple(entries), **facts)


def _read_yaml(path: str) -> Mixture:
    with yaml_file(path, "mixture") as (loader, root):
        facts: dict[str, Any] = {}
        sources = root
        if isinstance(root, yaml.MappingNode):
            sources = None
            for key, node in root.value:
                at = f"{path}:{key.start_mark.line + 1}"
                if key.value == "sources":
                    sources = node
                    continue
                value = loader.construct_document(node)
                if key.value == "drop_words" and isinstance(value, list) and all(map(_is_word, value)):
                    facts["drop_words"] = tuple(value)
                elif key.value == "match" and value in ("substring", "word"):
                    facts["match"] = value
                else:
                    raise ConfigError(
                        f"{at}: expected sources, drop_words (a list of texts) or match (substring or word)"
                    )
        if not isinstance(sources, yaml.SequenceNode) or not sources.value:
            raise ConfigError(f"{path}: expected a list of sources, each '- name: NAME' and an amount")
        entries = []
        for node in sources.value:
            at = f"{path}:{node.start_mark.line + 1}"
            entries.append(_entry(loader.construct_document(node), at))
        return _checked(entries, path, **facts)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _entry(value: object, where: str) -> MixtureEntry:
    if isinstance(value, str) and value:
        return MixtureEntry(name=value)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ConfigError(f"{where}: expected a name, or a mapping with name and one of {', '.join(_AMOUNTS)}")
    if unknown := [str(key) for key in value if key not in _KEYS]:
        raise ConfigError(f"{where}: unknown key {unknown[0]}; a source has {', '.join(_KEYS)}")
    kinds = [kind for kind in _AMOUNTS if kind in value]
    if len(kinds) > 1:
        raise ConfigError(f"{where}: {value['name']} has {kinds[0]} and {kinds[1]}; give one amount")
    unfiltered = value.get("unfiltered", False)
    if not isinstance(unfiltered, bool):
        raise ConfigError(f"{where}: unfiltered of {value['name']} must be true or false, not {unfiltered!r}")
    if not kinds:
        return MixtureEntry(name=value["name"], unfiltered=unfiltered)
    return _amount(value["name"], kinds[0], value[kinds[0]], where, unfiltered=unfiltered)


def mix_sft(options: SftMixture, *, progress: bool = False) -> MixtureCounts:
    """Write the records of a mixture, source by source, each line as it is.

    Args:
        options: the mixture, and the folder with a JSONL file of each source.
        progress: show a bar on stderr.

    Returns:
        How many were taken.

    Raises:
        ConfigError: no such mixture, or an amount that makes no sense.
        DataError: a source that is absent, or has fewer records than its count; names it.
        OutputError: the output cannot be written.
    """
    where, mixture = read_mixture(options.mixture)
    entries = _chosen(mixture, where, options)
    paths = [_find(entry.name, Path(options.input), where) for entry in entries]
    check_output(options.output, paths)
    words = _pattern(mixture)
    counts = MixtureCounts()
    with Progress(None, "mix_sft", "record", enabled=progress) as bar, replacing(options.output) as output:
        for entry, path in zip(entries, paths, strict=True):
            lines = [line.number for line in filled_lines(path)]
            taken, passes = _passes(entry, lines, path, options), 0
            for line in _repeated(path, taken):
                passes += 1
                bar.update(1)
                if words is not None and not entry.unfiltered and any(map(words.search, _said(line))):
                    counts.dropped += 1
                    passes -= 1
                else:
                    output.write(line.text() + "\n")
            counts.taken[entry.name] = passes
        if not sum(counts.taken.values()):
            raise DataError(f"{where} takes no record of {options.input}")
    return counts


def _chosen(mixture: Mixture, where: str, options: SftMixture) -> list[MixtureEntry]:
    names = [entry.name for entry in mixture.entries]
    if unknown := [name for name in options.without if name not in names]:
        raise ConfigError(f"without names {unknown[0]}, which is not in {where}: {', '.join(names)}")
    entries = [entry for entry in mixture.entries if entry.name not in options.without]
    if not entries:
        raise ConfigError(f"nothing of {where} is left without {', '.join(options.without)}")
    shared = entries[0].share is not None
    if shared != (options.total is not None):
        raise ConfigError(f"{where} has {'shares; give their total' if shared else 'no shares; leave total out'}")
    if options.total is None:
        return entries
    shares = np.array([entry.share or 0.0 for entry in entries])
    counts = _whole(options.total * shares / shares.sum())
    return [replace(entry, share=None, count=count) for entry, count in zip(entries, counts, strict=True)]


def _whole(exact: np.ndarray) -> list[int]:
    """Whole numbers of the same sum, which is whole: those that lack most are rounded up, of equals the first."""
    counts = np.floor(exact + 1e-9).astype(np.int64)
    missing = round(float(exact.sum())) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts.tolist()


def _find(name: str, folder: Path, where: str) -> Path:
    forms = [form.format(name=name) for form in _FORMS]
    path = next((folder / form for form in forms if (folder / form).is_file()), None)
    if path is None:
        raise DataError(
            f"{where} takes {name}, and there is neither {', '.join(forms[1:-1])} nor {forms[-1]}; make it with "
            f"megatron-grit convert-sft, or leave it out with --without {name}",
            path=folder,
        )
    return path


def _passes(entry: MixtureEntry, lines: list[int], path: Path, options: SftMixture) -> list[set[int] | None]:
    """Numbers of the lines that each pass over a file takes; None: all."""
    total = len(lines)
    if entry.count is not None and entry.count > total:
        raise DataError(f"has {total} records, and {entry.count} are asked for; give epochs to repeat them", path=path)
    epochs = entry.epochs if entry.epochs is not None else entry.fraction
    wanted = total if epochs is None else int(epochs * total + 0.5)
    if entry.count is not None or entry.cap is not None:
        wanted = entry.count if entry.count is not None else min(total, entry.cap or total)
    whole, rest = divmod(wanted, total) if total else (0, 0)
    random = np.random.default_rng([options.seed, zlib.crc32(entry.name.encode())])
    drawn = {lines[place] for place in random.permutation(total)[:rest].tolist()}
    return [*[None] * whole, *([drawn] if drawn else [])]


def _repeated(path: Path, passes: Sequence[set[int] | None]) -> Iterator[Line]:
    for taken in passes:
        for line in read_lines(path):
            if not line.is_blank and (taken is None or line.number in taken):
                yield line


def _pattern(mixture: Mixture) -> re.Pattern[str] | None:
    if not mixture.drop_words:
        return None
    either = "|".join(re.escape(word) for word in mixture.drop_words)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)" if mixture.match == "word" else either, re.IGNORECASE)


def _said(line: Line) -> Iterator[str]:
    """Texts of a record's messages, or all its strings but for names where it has none."""
    value = line.value()
    if isinstance(value, dict):
        messages = value.get("messages")
        if isinstance(messages, list) and messages:
            value = [one.get("content") for one in messages if isinstance(one, dict)]
        else:  # the name of a data set may be a vendor's
            value = [held for key, held in value.items() if key not in _FACTS]
    yield from strings(value)
