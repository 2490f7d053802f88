"""A model answers in the words that it was trained in, whichever door asks: ours, and transformers on its export.

For every template, for a model of here, for the import of its export, and with adapters: the same greedy answer, ended
by the template's own end, for one turn, several, and with a system message.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_grit.cli import generate
from megatron_grit.config.options import SamplingOptions
from megatron_grit.config.schema import AdapterConfig, RunConfig
from megatron_grit.convert.hf_in.convert import convert_checkpoint
from megatron_grit.convert.hf_out.convert import export_checkpoint
from megatron_grit.convert.peft.merge import export_adapter
from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.chat.chat import named_chat, write_chat
from megatron_grit.data.chat.chat_format import RULES
from megatron_grit.data.chat.chat_templates import TEMPLATES
from megatron_grit.data.chat.run_chat import run_chat
from megatron_grit.data.indexed.reader import read_meta
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.records import Message, parse_record, read_messages
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.generation.generate import generate_tokens
from megatron_grit.inference.messages import read_conversations
from megatron_grit.inference.model import GritModel
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.checkpoint import list_checkpoints
from megatron_grit.training.checkpoint_save import save_checkpoint
from megatron_grit.training.trainer import train
from tests.corpus import sentences, tiny_config, write_jsonl
from tests.unit.data.json_tokenizers import CHATML, chat_json

transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")

PAIRS = sentences(24)
QUESTION, ANSWER = PAIRS[3]
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one turn": [USER],
    "several": [USER, ASSISTANT, {"role": "user", "content": PAIRS[7][0]}],
    "system": [SYSTEM, USER, ASSISTANT, USER],
}
MINE = "user: 'U: {content}\\n'\nassistant: 'A: '\nanswer: '{content}<|im_end|>'\nspecial_tokens: ['<|im_end|>']\n"
NAMES = [*TEMPLATES, "tokenizer", "mine"]
LENGTH = 12
ENDS_AFTER = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a template of its own, and a file of conversations for each template."""
    folder = tmp_path_factory.mktemp("chat")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    texts = [text for pair in PAIRS for text in pair]
    chat_json(folder, texts, special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"], settings=settings)
    (folder / "mine.yaml").write_text(MINE)
    write_jsonl(folder / "chats.jsonl", [{"text": list(pair)} for pair in PAIRS])
    return folder


def data_of(folder: Path, name: str) -> Path:
    """An indexed file with a template."""
    prefix = folder / f"data_{name}"
    if not prefix.with_name(f"{prefix.name}.json").exists():
        template = str(folder / "mine.yaml") if name == "mine" else name
        build_grit([folder / "chats.jsonl"], prefix, folder / "tokenizer.json", template=template)
    return prefix


def config_of(folder: Path, *prefixes: Path) -> RunConfig:
    config = tiny_config()
    config.data.tokenizer, config.data.generative = str(folder / "tokenizer.json"), [str(each) for each in prefixes]
    config.training.objective, config.model.init_std = "generative", 0.3
    config.model.tie_embeddings, config.logging.progress = False, False
    return config


@contextmanager
def ending(model: GritModel, end: int) -> Iterator[None]:
    """The weights changed so that the answer to the first conversation ends with a token after a few others."""
    prompt = model.prompt_tokens(read_messages(CONVERSATIONS["one turn"]))
    options = SamplingOptions(max_new_tokens=LENGTH)
    (answer,) = generate_tokens(model.model, [prompt], options, stop_ids=(), max_positions=512)
    tokens = answer.tokens
    place = next(n for n in range(ENDS_AFTER, LENGTH) if tokens[n] not in tokens[:n])
    weight = model.model.output_layer.weight.data
    rows = [tokens[place], end]
    weight[rows] = weight[rows[::-1]].clone()
    yield
    weight[rows] = weight[rows[::-1]].clone()


def make_run(folder: Path, name: str, target: Path) -> None:
    """A checkpoint of random weights, as a run on the template's data keeps it; its answers end by the template."""
    config = config_of(folder, data_of(folder, name))
    config.output_dir = str(target)
    tokenizer = load_tokenizer(folder)
    with parallel_job(config.parallel, 1) as context:
        model = build_model(config, tokenizer.vocab_size, context).eval()
        chat = run_chat(config, tokenizer)
        with ending(GritModel(config, model, tokenizer, chat), chat.end_ids[-1]):
            save_checkpoint(config, context, model, None, tokenizer, step=1)


@contextmanager
def hidden(*paths: Path) -> Iterator[None]:
    """Without some files."""
    others = [path.rename(path.with_name(f"{path.name}.gone")) for path in paths]
    try:
        yield
    finally:
        for path in others:
            path.rename(path.with_name(path.name.removesuffix(".gone")))


def by_transformers(export: Path, adapter: Path | None = None) -> list[str]:
    """What transformers answers in each conversation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter or export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    if adapter is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, str(adapter))
        model.generation_config = transformers.GenerationConfig.from_pretrained(adapter)
    answers = []
    for messages in CONVERSATIONS.values():
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=LENGTH, do_sample=False)
        answers.append(str(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers


def answers_of(model: GritModel) -> list[str]:
    return [model.generate(messages, max_new_tokens=LENGTH) for messages in CONVERSATIONS.values()]  # type: ignore


@pytest.mark.parametrize("name", NAMES)
def test_every_door_answers_alike(folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint needs neither the data nor the template's file: both are gone when it is exported."""
    make_run(folder, name, tmp_path / "run")
    with hidden(*(folder / f"data_{name}.{ending}" for ending in ("json", "idx", "bin")), folder / "mine.yaml"):
        export = export_checkpoint(tmp_path / "run", tmp_path / "export")
    imported = convert_checkpoint(export, tmp_path / "imported")
    again = export_checkpoint(imported, tmp_path / "again")
    expected = by_transformers(export)

    model, back = GritModel.load(tmp_path / "run", device="cpu"), GritModel.load(imported, device="cpu")
    end = "</s>" if name in ("tulu", "gritlm", "zephyr", "llama2") else "<|im_end|>"
    ends = {model.tokenizer.eos_id, model.tokenizer.special_tokens[end]}
    assert set(model.chat.end_ids) == set(back.chat.end_ids) == ends and model.chat.origin == "training data"
    assert answers_of(model) == expected
    assert answers_of(back) == expected
    assert 0 < len(model.tokenizer.encode(expected[0])) < LENGTH, "the end was generated, and ended it"
    assert by_transformers(again) == expected
    stated = json.loads((export / "generation_config.json").read_text())["eos_token_id"]
    assert ({stated} if isinstance(stated, int) else set(stated)) == ends
    other = GritModel.load(tmp_path / "run", device="cpu", chat_template="zephyr" if name == "tulu" else "tulu")
    assert answers_of(other) != expected, "the template matters"
    assert "chat template" not in caplog.text


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A model of data in tulu's template, its export, and what it answers."""
    root = tmp_path_factory.mktemp("base")
    make_run(folder, "tulu", root / "run")
    export = export_checkpoint(root / "run", root / "export")
    return root / "run", export, answers_of(GritModel.load(root / "run", device="cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_adapters_keep_the_template_of_their_data(
    folder: Path, base: tuple[Path, Path, list[str]], tmp_path: Path, name: str
) -> None:
    """Their base answers in its own; the run with adapters in that of its data, merged or not."""
    run, plain, of_base = base
    config = config_of(folder, data_of(folder, name))
    config.output_dir, config.checkpoint.load = str(tmp_path / "run"), str(run)
    config.adapter, config.training.steps = AdapterConfig(kind="lora", rank=2), 1
    config.training.generative_batch_size, config.optimizer.lr = 4, 0.05
    train(config)
    merged = export_checkpoint(tmp_path / "run", tmp_path / "merged", adapters="trained")
    adapter = export_adapter(tmp_path / "run", tmp_path / "adapter")
    expected = by_transformers(merged)
    assert by_transformers(plain, adapter) == expected
    model = GritModel.load(tmp_path / "run", device="cpu")
    kind = model.chat.template.partition(":")[0]
    assert kind == name and answers_of(model) == expected
    assert of_base != expected


def test_messages_as_clients_write_them() -> None:
    """By the rule that a server reads them with; keys that a request may not hold are for the template in data."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    answer = {"role": "assistant", "content": "a", "refusal": None, "score": 3}
    messages = parse_record({"messages": [*asked, answer]}).messages
    assert messages == [
        Message("system", "be brief"),
        Message("user", "one\ntwo"),
        Message("assistant", "a", {"score": 3}),
    ]
    assert read_conversations(asked) == ([messages[:2]], True)
    with pytest.raises(DataError, match="message 2 holds score"):
        read_conversations([*asked, answer])
    with pytest.raises(DataError, match="message 1 is of role assistant where user was expected"):
        read_conversations([asked[0], {"role": "assistant", "content": "a"}])


DATED = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML


def test_a_date_is_kept_and_may_be_fixed(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The .json and the checkpoint say which date the data have; a prompt has today's, or the one that is asked for."""
    dated = tmp_path / "dated"
    dated.mkdir()
    for name in ("tokenizer.json", "chats.jsonl"):
        shutil.copy(folder / name, dated / name)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": DATED}
    (dated / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    make_run(dated, "tokenizer", tmp_path / "run")
    meta = read_meta(str(dated / "data_tokenizer"))
    assert (meta.template_date, meta.template_rules, meta.template_turns) == ("2024-07-26", RULES, None)
    other = read_meta(str(data_of(folder, "chatml")))
    assert (other.template_date, other.template_rules) == (None, RULES)
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert json.loads((checkpoint / "chat.json").read_text())["date"] == "2024-07-26"
    theirs = transformers.AutoTokenizer.from_pretrained(dated)
    text = theirs.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    model = GritModel.load(checkpoint, device="cpu")
    today = model.tokenizer.decode(model.prompt_tokens(read_messages([USER]))).splitlines()[0]
    for given, day in ((None, text.splitlines()[0]), ("data", "26 Jul 2024"), ("2031-02-03", "03 Feb 2031")):
        model.chat_date = model.chat.date_of(given)
        ids = model.prompt_tokens(read_messages([USER]))
        assert given is None or ids == theirs(text.replace(today, day), add_special_tokens=False)["input_ids"]
        assert model.tokenizer.decode(ids).splitlines()[0] == day or given is None  # midnight may fall between
    for chosen, message in (("3 May", "must be YYYY-MM-DD or \"data\", not '3 May'"), ("2031-02-03", "")):
        command = ["--checkpoint", str(checkpoint), "--prompt", "a", "--device", "cpu", "--max-new-tokens", "1"]
        assert generate.main([*command, "--chat-date", chosen]) == (2 if message else 0)
        assert message in capfd.readouterr().err
    with pytest.raises(ConfigError, match="data of chat template chatml hold no date"):
        named_chat("chatml", model.tokenizer, "a test").date_of("data")


def test_what_the_loader_has_read_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokenizer = config_of(folder, data_of(folder, "tulu")), load_tokenizer(folder)
    metas = GritDataLoader(config, tokenizer).metas
    expected = run_chat(config, tokenizer)
    monkeypatch.setattr("megatron_grit.data.chat.run_chat.read_meta", lambda prefix: pytest.fail(f"read {prefix}"))
    assert run_chat(config, tokenizer, metas=metas) == expected


def test_several_templates_need_a_choice(folder: Path) -> None:
    config, tokenizer = config_of(folder, data_of(folder, "tulu"), data_of(folder, "chatml")), load_tokenizer(folder)
    with pytest.raises(ConfigError, match=r"data_tulu with tulu, .*data_chatml with chatml\).*give data.chat_template"):
        run_chat(config, tokenizer)
    config.data.chat_template = "zephyr"
    assert run_chat(config, tokenizer).template == "zephyr"
    # build-grit names a template for plain texts too.
    write_jsonl(folder / "texts.jsonl", [{"text": answer} for _, answer in PAIRS])
    build_grit([folder / "texts.jsonl"], folder / "texts", folder / "tokenizer.json")
    config = config_of(folder, folder / "texts", data_of(folder, "chatml"))
    assert run_chat(config, tokenizer).template == "chatml"
    with pytest.raises(ConfigError, match="no chat template nonsense; there are tulu"):
        config.data.chat_template = "nonsense"
        run_chat(config, tokenizer)


def test_a_run_takes_after_its_base(folder: Path, tmp_path: Path) -> None:
    """Where it has no conversations of its own: its checkpoint, the folder of its tokenizer, or nothing at all."""
    tokenizer = load_tokenizer(folder)
    config = config_of(folder)
    config.training.objective = "embedding"
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    own = run_chat(config, tokenizer)
    assert own.template.startswith("tokenizer:") and own.source == CHATML
    assert own.end_ids == (tokenizer.eos_id, 2, tokenizer.special_tokens["<|im_end|>"])
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(DataError, match="generation_config.json: eos_token_id is '</s>'; it must be a token id"):
        run_chat(config, tokenizer)
    (folder / "generation_config.json").unlink()
    zephyr = named_chat("zephyr", tokenizer, "a test")
    write_chat(zephyr, tmp_path)
    assert run_chat(config, tokenizer, [tmp_path / "none", tmp_path]) == zephyr
    (tmp_path / "chat.json").write_text("{}")
    with pytest.raises(DataError, match=r"chat\.json: cannot be read"):
        run_chat(config, tokenizer, [tmp_path])
    plain = tmp_path / "plain" / "tokenizer.json"
    plain.parent.mkdir()
    shutil.copy(folder / "tokenizer.json", plain)
    assert run_chat(config, load_tokenizer(plain)).template == "gritlm"


def test_an_end_that_is_no_token_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chat_json(tmp_path, [text for pair in PAIRS for text in pair])
    chat = named_chat("chatml", load_tokenizer(tmp_path), "a test")
    assert chat.end_ids == (load_tokenizer(tmp_path).eos_id,)
    assert "chatml: what ends an answer, '<|im_end|>', is no token" in caplog.text
