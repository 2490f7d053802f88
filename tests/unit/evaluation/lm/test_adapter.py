"""lm-eval through our adapter and through its own backend for Hugging Face models gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.options import HarnessModel
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.text.records import Message
from megatron_grit.errors import ConfigError, DataError
from tests.unit.evaluation.lm.local_tasks import NAMES, distance, responses, write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("lm") / "tasks")


@pytest.fixture(scope="module")
def exported(trained_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_grit.convert.hf_out.convert import export_checkpoint

    return export_checkpoint(trained_run.output_dir, tmp_path_factory.mktemp("exported") / "hf")


@pytest.fixture(scope="module")
def reference(exported: Path) -> Any:
    """lm-eval's own backend."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=3, max_length=512)


@pytest.fixture(scope="module")
def ours(trained_run: RunConfig) -> Any:
    from megatron_grit.evaluation.lm.adapter import MegatronGritLM

    return MegatronGritLM(str(trained_run.output_dir), device="cpu", batch_size=5)


@pytest.fixture
def short(reference: Any, ours: Any) -> Iterator[None]:
    """Models that read 64 tokens, so that texts are read in windows and prompts are cut."""
    kept = ours.max_length
    reference._max_length = ours.max_length = 64
    yield
    reference._max_length, ours.max_length = 512, kept


@pytest.mark.parametrize("chat", [False, True])
def test_numbers_are_those_of_transformers(
    reference: Any, ours: Any, tasks: Path, chat: bool, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of bytes that are no UTF-8, which this model writes, sentencepiece and tokenizers make different texts.
    read = reference.tokenizer.decode
    monkeypatch.setattr(ours.model.tokenizer, "decode", lambda ids: read(ids, skip_special_tokens=True))
    names = tuple(name for name in NAMES if name != "local_text")
    assert distance(responses(ours, tasks, chat, names), responses(reference, tasks, chat, names)) < 1e-5


def test_rolling_reads_one_bos(reference: Any, ours: Any, tasks: Path, short: None) -> None:
    found = responses(ours, tasks, names=("local_text",))
    assert len(found["local_text"]) == 5
    doubled = responses(reference, tasks, names=("local_text",))
    reference.add_bos_token = False
    single = responses(reference, tasks, names=("local_text",))
    reference.add_bos_token = None
    assert distance(found, single) < 1e-5
    assert distance(doubled, single) > 1e-3  # its tokenizer adds BOS, and the prefix is one more


def test_batches_and_passes_change_nothing(trained_run: RunConfig, exported: Path, ours: Any, tasks: Path) -> None:
    from megatron_grit.evaluation.lm.adapter import MegatronGritLM

    expected = responses(ours, tasks, chat=True)
    for checkpoint, batch_tokens, at_once in ((trained_run.output_dir, 1, 1), (exported, 4096, 64)):
        options = HarnessModel(checkpoint=str(checkpoint), device="cpu", batch_tokens=batch_tokens, at_once=at_once)
        assert distance(responses(MegatronGritLM.leading(options), tasks, chat=True), expected) < 1e-5


def test_bos_stands_once(ours: Any) -> None:
    bos = ours.model.tokenizer.bos_id
    written = ours.apply_chat_template([{"role": "user", "content": "what does the parser do?"}])
    assert written.startswith("<s>")  # the template writes BOS, and the tokenizer would add it
    ids = ours.tok_encode(written)
    assert ids.count(bos) == 1 and ids[0] == bos
    assert ids == ours.model.prompt_tokens([Message("user", "what does the parser do?")])
    assert ours.tok_encode("the parser")[0] == bos and bos not in ours.tok_encode("the parser", False)
    with pytest.raises(DataError, match="begins with two BOS"):
        ours.tok_encode("<s>" + written)
    with pytest.raises(DataError, match="begins with two BOS"):
        ours._loglikelihood_tokens([(("", ""), [bos, bos, 7], [8])])


def test_an_answer_that_is_begun(ours: Any, reference: Any) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what does the parser do?"},
        {"role": "assistant", "content": "The parser"},
    ]
    for begun in (False, True):
        given = history if begun else history[:2]
        expected = reference.apply_chat_template(given, add_generation_prompt=not begun)
        assert ours.apply_chat_template(given, add_generation_prompt=not begun) == expected


def test_arguments(trained_run: RunConfig) -> None:
    from megatron_grit.evaluation.lm.adapter import MegatronGritLM

    with pytest.raises(ConfigError, match=r"model argument batch_token is not known \(did you mean batch_tokens"):
        MegatronGritLM(str(trained_run.output_dir), batch_token=3)
    with pytest.raises(ConfigError, match="tensor"):
        MegatronGritLM(str(trained_run.output_dir), tensor=0)


def test_arguments_of_the_model_count_before_the_commands(trained_run: RunConfig) -> None:
    from megatron_grit.evaluation.lm.adapter import MegatronGritLM

    command = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}  # which lm-eval's says in any case
    told = {"checkpoint": str(trained_run.output_dir), "device": "cpu", "at_once": 3}
    for made in (
        MegatronGritLM.create_from_arg_obj(told, command),
        MegatronGritLM.create_from_arg_string(",".join(f"{name}={value}" for name, value in told.items()), command),
    ):
        assert made.model.model.context.device.type == "cpu"
