"""A reward model learns what was preferred, and is the same in transformers: exported, and read back."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_grit.cli import train
from megatron_grit.config.options import RewardEvaluation
from megatron_grit.convert.hf_in.convert import convert_checkpoint
from megatron_grit.convert.hf_out.convert import export_checkpoint
from megatron_grit.data.text.records import Message
from megatron_grit.errors import CheckpointError, ConfigError, DataError
from megatron_grit.evaluation.rewards import evaluate_rewards
from megatron_grit.inference.rollouts.reward_model import RewardModel
from tests.corpus import _OBJECTS, _SUBJECTS, _VERBS, sentences, write_jsonl
from tests.parity.test_hf_export import read_weights
from tests.parity.test_hf_import import MODELS, make_model
from tests.rows import tiny_config

transformers = pytest.importorskip("transformers", reason="the reference is transformers")

TOLERANCE = 1e-5


def pairs(count: int, seed: int) -> list[dict[str, object]]:
    """Of two answers that differ in their verb the one with a verb of the first half is preferred."""
    random, half = np.random.default_rng(seed), len(_VERBS) // 2
    found: list[dict[str, object]] = []
    for _ in range(count):
        subject, good, bad = random.choice(_SUBJECTS), random.choice(_VERBS[:half]), random.choice(_VERBS[half:])
        said = random.choice(_OBJECTS)
        found.append(
            {
                "prompt": [{"role": "user", "content": f"what does the {subject} do?"}],
                "chosen": f"The {subject} {good} {said}.",
                "rejected": f"The {subject} {bad} {said}.",
            }
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``, trained on pairs; ``held_out.jsonl``, others."""
    from megatron_grit.config.checks.run import check
    from megatron_grit.config.embedding_shape import SCALAR
    from megatron_grit.config.kinds import option
    from megatron_grit.data.builders.grit_builder import build_grit
    from megatron_grit.data.indexed.roles import RowKind
    from megatron_grit.data.text.tokenizer import train_sentencepiece
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.trainer import Trainer

    folder = tmp_path_factory.mktemp("reward")
    train_sentencepiece([text for pair in sentences(96) for text in pair], folder / "tokenizer", 400)
    write_jsonl(folder / "held_out.jsonl", pairs(100, seed=1))
    path = write_jsonl(folder / "pairs.jsonl", pairs(200, seed=0))
    tokenizer = folder / "tokenizer.model"
    build_grit([path], folder / "pairs", tokenizer, kind=RowKind.PREFERENCE, turns="last")
    config = tiny_config(num_layers=2)
    config.data.tokenizer, config.training.objective = str(tokenizer), "reward"
    config.output_dir, config.logging.progress = str(folder / "run"), False
    config.data.tokens_per_row, config.training.steps = 1024, 30
    config.optimizer.lr = 3e-3
    vars(config.embedding).update(SCALAR)
    knobs = option(config, "reward")
    knobs.data, knobs.batch_size, knobs.centering = [str(folder / "pairs")], 16, 0.01
    with parallel_job(config.parallel, config.training.seed) as context:
        check(config, context.world_size)
        Trainer(config, context).run()
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    """A model of transformers that generates, with the tokenizer of the pairs."""
    torch.manual_seed(5)
    make_model("llama", 400, 2).save_pretrained(folder / "hf")
    shutil.copy(folder / "tokenizer.model", folder / "hf")
    return folder / "hf"


def train_from(folder: Path, source: Path, name: str, steps: int, *options: str) -> Path:
    """Train a reward model from a directory of Hugging Face files, by the command."""
    settings = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    settings["model"] = {"pretrained": str(source)}
    settings["training"]["steps"], settings["output_dir"] = steps, str(folder / name)
    settings["data"]["tokenizer"] = None
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(folder / f"{name}.yaml"), *options]) == 0
    return folder / name


def evaluate(folder: Path, **options: Any) -> dict[str, Any]:
    given = {"checkpoint": str(folder / "run"), "data": str(folder / "held_out.jsonl"), "device": "cpu"}
    return evaluate_rewards(RewardEvaluation(**(given | options)))


def test_it_learns_what_was_preferred(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other pairs; swapped ones are the control."""
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss_reward"] == pytest.approx(np.log(2), abs=0.1) and steps[-1]["loss_reward"] < 0.3
    figures = evaluate(folder, output=str(folder / "figures.json"))
    assert figures["accuracy"] > 0.9 and figures["intervals"]["accuracy"][0] > 0.8 and figures["num_pairs"] == 100
    assert json.loads((folder / "figures.json").read_text()) == figures
    assert figures["margin"] == pytest.approx(figures["chosen"] - figures["rejected"], abs=1e-5)
    assert abs(figures["chosen"] + figures["rejected"]) < figures["margin"]  # centered
    both = pairs(3, seed=1)
    both[1]["rejected"], both[2]["rejected"] = f"{both[1]['chosen']} ", f"{both[2]['chosen']} "
    monkeypatch.setattr(logging.getLogger("megatron_grit"), "propagate", True)
    with caplog.at_level("WARNING"):
        ties = evaluate(folder, data=str(write_jsonl(folder / "ties.jsonl", both)))
    assert figures["num_equal"] == 0 and ties["num_equal"] == 2 and ties["accuracy"] <= 1 / 3
    assert "the answers of 2 of 3 pairs are the same tokens; each is a tie" in caplog.text
    swapped = [each | {"chosen": each["rejected"], "rejected": each["chosen"]} for each in pairs(100, seed=1)]
    write_jsonl(folder / "swapped.jsonl", swapped)
    assert evaluate(folder, data=str(folder / "swapped.jsonl"))["accuracy"] == pytest.approx(1 - figures["accuracy"])


@torch.no_grad()
def test_transformers_gives_the_same_rewards(folder: Path) -> None:
    """One by one and in padded batches, of texts in the export's chat template; and what is read back does."""
    export_checkpoint(folder / "run", folder / "out")
    settings = json.loads((folder / "out" / "config.json").read_text())
    assert (
        settings["architectures"] == ["MistralForSequenceClassification"] or "Sequence" in settings["architectures"][0]
    )
    weights = read_weights(folder / "out")
    assert weights["score.weight"].shape == (1, 64) and not any("lm_head" in name for name in weights)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "out").eval()
    assert model.num_labels == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    chats = [
        [Message("user", f"what does the {subject} do?"), Message("assistant", f"The {subject} {verb} a file." * count)]
        for subject, verb, count in zip(_SUBJECTS[:5], _VERBS[:5], (1, 4, 2, 1, 3), strict=True)
    ]
    chats.append([*chats[0], Message("user", "and then?"), Message("assistant", "It ends.")])
    ours = RewardModel.load(folder / "run", "cpu").score(chats)
    assert np.ptp(ours) > 0.05
    texts = [
        tokenizer.apply_chat_template([each._asdict() for each in chat], tokenize=False).rstrip() for chat in chats
    ]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        assert not batch["attention_mask"].all()
        np.testing.assert_allclose(model(**batch).logits[:, 0].numpy(), ours, rtol=0, atol=TOLERANCE)
    alone = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
    theirs = [float(model(**each).logits) for each in alone]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE)
    cut = model(input_ids=alone[0]["input_ids"][:, :-1]).logits  # without the token that ends the answer
    assert abs(float(cut) - ours[0]) > 10 * TOLERANCE
    back = RewardModel.load(convert_checkpoint(folder / "out", folder / "back"), "cpu").score(chats)
    np.testing.assert_allclose(back, ours, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neox"])
def test_models_of_transformers_come_in_and_out(name: str, tmp_path: Path) -> None:
    """Bit for bit, with the rewards that transformers gives."""
    from megatron_grit.data.text.tokenizer import train_sentencepiece

    texts = [text for pair in sentences(200) for text in pair]
    tokenizer = train_sentencepiece(texts, tmp_path / "tokenizer", 331)
    config = make_model(name, 331, 2).config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(3)
    theirs = getattr(transformers, f"{MODELS[name][0]}ForSequenceClassification")(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours", tokenizer)
    ours = RewardModel.load(tmp_path / "ours", "cpu")
    chats = [
        [Message("user", "a b"), Message("assistant", "def f(x): return x")],
        [Message("user", "x"), Message("assistant", "y")],
    ]
    found = ours.score(chats)
    expected = [float(theirs(input_ids=torch.tensor([ours.tokens(chat)])).logits) for chat in chats]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert abs(found[0] - found[1]) > 100 * TOLERANCE
    export_checkpoint(tmp_path / "ours", tmp_path / "out")
    source, out = read_weights(tmp_path / "hf"), read_weights(tmp_path / "out")
    assert source.keys() == out.keys() and all(torch.equal(out[key], source[key]) for key in source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(theirs).__name__]


def of_base(source: dict[str, torch.Tensor], out: dict[str, torch.Tensor]) -> set[str]:
    """Of the weights that an export shares with the model that its run began with: those that are others now."""
    assert source.keys() - out.keys() == {"lm_head.weight"} and out.keys() - source.keys() == {"score.weight"}
    return {key for key in out.keys() - {"score.weight"} if not torch.equal(out[key], source[key])}


def test_a_reward_model_begins_with_a_model_of_transformers(folder: Path, source: Path, tmp_path: Path) -> None:
    """Bit for bit, and with a head of its own."""
    export_checkpoint(train_from(folder, source, "begun", 0), tmp_path / "out")
    assert of_base(read_weights(source), read_weights(tmp_path / "out")) == set()


def test_adapters_and_a_head_are_a_reward_model(folder: Path, source: Path, tmp_path: Path) -> None:
    """It learns, beside weights that stay; merged into them it gives the same rewards in transformers."""
    lora = ["--adapter.kind", "lora", "--adapter.targets", "[q_proj, v_proj, up_proj, down_proj]"]
    run = train_from(folder, source, "adapted", 40, *lora, "--optimizer.lr", "1e-2")
    assert evaluate(folder, checkpoint=str(run))["accuracy"] > 0.9
    export_checkpoint(run, tmp_path / "out", adapters="trained")
    changed = of_base(read_weights(source), read_weights(tmp_path / "out"))
    assert {key.split(".")[-2] for key in changed} == {"q_proj", "v_proj", "up_proj", "down_proj"}
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ours = RewardModel.load(run, "cpu")
    chats = [
        [Message("user", "what does the parser do?"), Message("assistant", f"The parser {verb} a file.")]
        for verb in (_VERBS[0], _VERBS[-1])
    ]
    found = ours.score(chats)
    with torch.no_grad():
        expected = [float(theirs(input_ids=torch.tensor([ours.tokens(chat)])).logits) for chat in chats]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert found[0] > found[1] + 0.1


BAD_PAIRS: dict[str, tuple[object, str]] = {
    "rated": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": True},
        "has a single answer, and rewards are compared",
    ),
    "no pair": ({"text": "a"}, 'no "chosen" with "rejected"'),
    "long": (
        {"prompt": "a " * 600, "chosen": "b", "rejected": "c"},
        '"chosen" has [0-9,]+ tokens, and the model takes 512',
    ),
}


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_bad_pairs_are_one_line(folder: Path, what: str) -> None:
    record, message = BAD_PAIRS[what]
    path = write_jsonl(folder / f"{what}.jsonl", [*pairs(1, seed=2), record])  # type: ignore[list-item]
    with pytest.raises(DataError, match=message) as caught:
        evaluate(folder, data=str(path))
    assert f"{path.name}:2" in str(caught.value) and "\n" not in str(caught.value)


def test_other_settings_are_refused(folder: Path) -> None:
    from megatron_grit.config.checks.run import check
    from megatron_grit.config.kinds import option

    config = tiny_config(num_layers=2)
    config.training.objective, config.data.tokenizer = "reward", str(folder / "tokenizer.model")
    option(config, "reward").data = [str(folder / "pairs")]
    with pytest.raises(ConfigError, match=r"set embedding to \{pooling: lasttoken, causal: true, normalize: false"):
        check(config, 1)


def test_another_checkpoint_is_no_reward_model(folder: Path, tmp_path: Path) -> None:
    from tests.unit.convert.hf_out.test_convert import make_checkpoint

    run, _ = make_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is no reward model"):
        evaluate(folder, checkpoint=str(run))


def test_padding_that_ends_answers_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_grit.convert.hf_out import tokenizer

    monkeypatch.setattr(tokenizer, "_unknown_token", lambda *_: {})
    with pytest.raises(CheckpointError, match="has no token to pad with but '</s>'"):
        export_checkpoint(folder / "run", tmp_path / "out")


def test_rollouts_are_rewarded_by_it(folder: Path) -> None:
    from megatron_grit.data.rollouts.records import read_groups
    from megatron_grit.inference.rollouts.options import RewardOptions
    from megatron_grit.inference.rollouts.rewards import Rewards

    asked = [{"role": "user", "content": "what does the parser do?"}]
    said = ["The parser opens a file.", "The parser splits a file."]
    lines: list[dict[str, object]] = [
        {"messages": asked, "completions": said},
        {"prompt": "what does the parser do?", "completions": said},
    ]
    path = write_jsonl(folder / "sampled.jsonl", lines)
    rewards = Rewards(RewardOptions(reward=[f"2*model:{folder / 'run'}"]))
    model = RewardModel.load(folder / "run", "cpu")
    chat, plain = read_groups(path, answered=True)
    for group in (chat, plain):
        rewards.add(group)
    expected = model.score([[Message("user", asked[0]["content"]), Message("assistant", text)] for text in said])
    found = [completion.reward for completion in chat.completions]
    np.testing.assert_allclose(found, 2 * expected, rtol=0, atol=TOLERANCE)
    assert expected[0] > expected[1] and plain.completions[0].reward != found[0]
    with pytest.raises(ConfigError, match="--reward model: needs the checkpoint of a reward model"):
        Rewards(RewardOptions(reward=["model"]))
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        Rewards(RewardOptions(reward=[f"model:{folder / 'none'}"]))
