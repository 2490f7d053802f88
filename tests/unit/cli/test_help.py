"""Every verb and tool explains each field of its dataclass, reads its flags in both spellings, and starts light."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from megatron_grit.cli import main as cli
from megatron_grit.config.commands import Option, options_of, read_options
from megatron_grit.config.parse import TrainSwitches, run_options
from megatron_grit.config.values import documents
from megatron_grit.data.chat.chat_format import TOKENIZER
from megatron_grit.data.chat.chat_templates import TEMPLATES
from megatron_grit.errors import ConfigError
from tests.repo import laws

VERBS = {verb: path for verb, path in cli.verbs().items() if verb != "train"}
TOOLS = [name for name in laws.tracked_files(Path(__file__).parents[3]) if name.startswith("tools/") and ".py" in name]


class _SeenError(Exception):
    pass


def module_of(verb: str) -> typing.Any:
    path = VERBS[verb].relative_to(Path(cli.__file__).parent).with_suffix("")
    return importlib.import_module(".".join(["megatron_grit", "cli", *path.parts]))


def options_class(verb: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """The dataclass that a verb hands to the reader of command lines."""
    seen: list[type] = []

    def note(cls: type, *_: object, **__: object) -> None:
        seen.append(cls)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse_command", note)
    assert module_of(verb).main([]) == 130
    monkeypatch.undo()
    return seen[0]


def fields_of(cls: type) -> list[dataclasses.Field]:
    """All fields, those of nested dataclasses in place of themselves."""
    found: list[dataclasses.Field] = []
    for field in dataclasses.fields(cls):
        hint = field.metadata.get("settings", typing.get_type_hints(cls)[field.name])
        found += fields_of(hint) if dataclasses.is_dataclass(hint) else [field]  # type: ignore[arg-type]
    return [field for field in found if not field.metadata.get("rest")]


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_field(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cls = options_class(verb, monkeypatch)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    shown = {word.removeprefix("--").removeprefix("[no-]") for line in text.splitlines() for word in line.split()[:1]}
    for field in fields_of(cls):
        name = field.metadata.get("flag", field.name)
        assert field.metadata.get("positional") or name.replace("_", "-") in shown, f"--{name} is not explained"
    assert f"    megatron-grit {verb} " in text or f"  megatron-grit {verb} " in text, "no example"
    for field in fields_of(cls):
        if type(field.default) in (int, float):
            assert f"default: {field.default})" in " ".join(text.split()), f"the default of {field.name}"


@pytest.mark.parametrize("verb", VERBS)
def test_dashes_and_underscores(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(options_class(verb, monkeypatch))
    for key, option in options.items():
        if not option.field.metadata.get("positional"):
            name = option.shown.removeprefix("--")
            for word in (f"--{name}=x", f"--{name.replace('-', '_')}=x"):
                assert [given.option.key for given in read_options([word], options)] == [key]


def test_dashes_and_underscores_of_a_run() -> None:
    options = options_of(TrainSwitches) | run_options()
    for key in options:
        for word in (f"--{key}=x", f"--{key.replace('_', '-')}=x"):
            assert [given.option.key for given in read_options([word], options)] == [key]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_a_verb(
    tool: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its help is that of the verb whose main it imports; all but one have its name."""
    imported = re.findall(r"from megatron_grit\.cli\.([\w.]+) import main", (repository / tool).read_text())
    verb = next(name for name in VERBS if module_of(name).__name__ == f"megatron_grit.cli.{imported[0]}")
    assert verb in (Path(tool).stem.replace("_", "-"), "evaluate qa")
    texts = []
    for argv in ([f"megatron-grit {verb}"], [Path(tool).stem]):
        monkeypatch.setattr(sys, "argv", [*argv, "--help"])
        with pytest.raises(SystemExit) as end:
            if texts:
                runpy.run_path(str(repository / tool), run_name="__main__")
            else:
                cli.main([verb, "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: {argv[0]} ")
        texts.append(text.partition("\n\n")[2])
    assert texts[0] == texts[1]


def test_a_place_that_may_stay_empty_is_in_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    usage = " ".join(capsys.readouterr().out.partition("\n\n")[0].split())
    assert usage == "usage: megatron-grit report [RUN ...] --output-dir OUTPUT_DIR [OPTION ...]"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["encode", "--imput", "a"], "unknown option --imput (did you mean --input?)"),
        (["encode", "--input", "a"], "--checkpoint, --output must be given; megatron-grit encode --help explains"),
        (["encode", "--checkpoint=", "--input=a", "--output=b"], "--checkpoint must not be empty"),
        (
            ["generate", "--checkpoint=a", "--prompt=b", "--temperature=nan"],
            "--temperature must be at least 0, not",
        ),
        (["generate", "--checkpoint=a", "--prompt=b", "--temperature=inf"], "--temperature must be a finite number"),
        (["generate", "--checkpoint=a", "--prompt=b", "--seed", "-1"], "--seed must be at least 0, not -1"),
        (["generate", "--checkpoint=a", "--prompt=b", "--seed", "x"], "--seed must be int, at least 0, not 'x'"),
        (
            ["generate", "--checkpoint=a", "--prompt=b", f"--seed={10**20}"],
            f"--seed must be at least 0 and at most {2**63 - 1}",
        ),
        (["encode", "--checkpoint=a", "--input=b", "--output=c", f"--batch-tokens={10**20}"], "--batch-tokens must be"),
        (["generate", "--checkpoint=a", "--prompt", "null"], "no checkpoint here"),
        (["generate", "--checkpoint"], "--checkpoint needs a value"),
        (["generate", "a"], "'a' belongs to no option"),
        (["serve", "--checkpoint=a", "--port=65536"], "--port must be at least 0 and at most 65535, not 65536"),
        (["serve", "--checkpoint=a", "--device=gpu"], "--device must be one of auto, cpu, cuda, not 'gpu'"),
        (["build-sft", "--overwrite=perhaps"], "--overwrite must be true or false, not 'perhaps'"),
        (["build-sft", "--workers", "null", "--partitions", "null"], "--partitions must be int, at least 1, not null"),
        (["weight-diff", "mak"], "MAKE|"),
        (["evaluate", "qu"], "'qu' belongs to no option"),
        (["evaluate-qa"], "unknown verb 'evaluate-qa' (did you mean evaluate qa?)"),
        (["evaluate", "qa", "a"], "error: REFERENCES must be given; megatron-grit evaluate qa --help explains"),
        (["plan", "--world-sise", "8"], "unknown option --world-sise (did you mean --world-size?)"),
        (["convert", "--from=a", "--to=b", "--merge", "--adapter-only"], "holds no checkpoint of ours"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message.replace("MAKE|", "ACTION must be one of make, recover, verify") in error


def test_lists_booleans_and_words_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_grit.config.commands import parse_command

    def read(verb: str, *argv: str) -> typing.Any:
        return parse_command(options_class(verb, monkeypatch), argv, prog=verb, description="")

    needed = ["--output-prefix=o", "--tokenizer=t"]
    assert read("build-sft", "--input", "a", "b", *needed).input == ["a", "b"]
    assert read("build-sft", "--input", "[a, b]", "--input+", "c", *needed).input == ["a", "b", "c"]
    assert read("build-sft", "--input", "a", "--input", "b", *needed).input == ["b"]
    options = read("build-sft", "--input=a", "--deduplicate", "--no-checksum", "--overwrite", "false", *needed)
    assert (options.deduplicate, options.checksum, options.overwrite) == (True, False, False)
    for text, margin in (("off", None), ("-1e-3", -1e-3)):
        assert (
            read("convert-msmarco", *"--queries=a --corpus=b --negatives=c --output=d".split(), "--margin", text).margin
            == margin
        )
    assert read("inspect-db", "--project-dir", "d", "--search", "[MASK]", "[b").search == ["[MASK]", "[b"]
    assert read("mine-negatives", "--input=a", "--output=b", "--ranks", "3-5").ranks == (3, 5)
    assert read("convert", "--from=a", "--to=b", "--merge").merge == "trained"
    assert read("convert", "--from=a", "--to=b", "--merge", "original").merge == "original"
    given = read("build-db", "--project-dir=d", "--chunk-length", "32", "--index_on_gpu", "true", "--nprobe=null").given
    assert given == {"chunk_length": 32, "index_on_gpu": True, "nprobe": None}
    options = read("plan", "--json", "--model", "tiny_mistral", "--peak-tflops=5", "--training.steps", "3")
    assert (options.json, options.machine.peak_tflops) == (True, 5.0)
    assert options.run == ["--model", "tiny_mistral", "--training.steps", "3"]


def test_help_names_every_template(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["build-grit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(sorted(TEMPLATES))}, {TOKENIZER} " in text


def test_help_starts_light(repository: Path) -> None:
    """All verbs are imported and explained without torch, numpy and the like."""
    code = (
        "import sys\nfrom megatron_grit.cli import main as cli\n"
        "for verb in cli.verbs():\n    try: cli.main([verb, '--help'])\n    except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy', 'faiss', 'tokenizers', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: ") == len(cli.verbs())


_OF_PATHS = re.compile(r"director|folder|\bfiles?\b|prefix|jsonl|\.npy|checkpoint|evaluate of", re.IGNORECASE)
NO_PATHS = {
    *("name", "host", "lang", "revision", "max_shard_size", "tasks", "split", "json_keys", "tombstone", "overwrite"),
    *("document", "neighbors", "index", "wandb_project", "architecture", "query_instruction", "model"),
    *("generator", "metric"),
}
"""Options whose explanation speaks of files. A tombstone and a model may be a word."""


@pytest.mark.parametrize("verb", VERBS)
def test_every_path_takes_home_and_variables(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _takes_home_and_variables(options_of(options_class(verb, monkeypatch)), monkeypatch)


def test_every_path_of_a_run_takes_home_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    _takes_home_and_variables(options_of(TrainSwitches) | run_options(), monkeypatch)


def _takes_home_and_variables(options: dict[str, Option], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    for option in options.values():
        parts = {option.hint, *typing.get_args(option.hint)}
        parts |= {part for hint in parts for part in typing.get_args(hint)}
        name, is_path = option.field.name, bool(option.field.metadata.get("path"))
        if not parts & {str, Path} or "read" in option.field.metadata:
            continue
        if _OF_PATHS.search(documents(option.group)[name]) and name not in NO_PATHS:
            assert is_path, f"{option.shown} is a path: knob(path=True)"
        if is_path:
            value = option.read(["$SCRATCH/a"])
            assert str(value[0] if isinstance(value, list) else value) == "/scratch/a"
            with pytest.raises(ConfigError, match=f"{option.shown} must not be empty"):
                option.check(option.read([""]))
