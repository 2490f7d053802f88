"""What GRPO gives on a task with answers that can be verified, in miniature: samples, rewards, steps of one process.

A prompt asks for a number in a form, "roman of seven"; right is "VII". A tiny decoder first learns from answers in a
form that is drawn whatever the prompt asks for, so that a third of what it samples is right. Then each round samples
--n completions of every prompt with the model's own generation, rewards those that are right, builds them as
megatron-grit build-rollouts does, and takes --updates steps on them, each on a part of them, so that ratios leave 1 and
clipping has something to do. The reward is the mean over sampled completions; target: from the first round to the last
three it rises by at least 0.3, with every variant in the mean of the seeds. The control takes the same steps with
rewards that are drawn, and no seed of it may reach that.

Example:
    python -m benchmarks.grpo_toy --json grpo_toy.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import t_interval
from megatron_grit.config.kinds import option
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.model import ModelConfig
from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
FORMS = {
    "words": NUMBERS,
    "digits": tuple("12345678"),
    "roman": ("I", "II", "III", "IV", "V", "VI", "VII", "VIII"),
}
TARGET = 0.3


@dataclass(frozen=True, kw_only=True)
class Toy:
    """How much is trained."""

    n: int = 8
    rounds: int = 20
    updates: int = 2
    base_steps: int = 150
    lr: float = 1e-3
    seed: int = 1
    options: dict[str, Any]
    """Of the section of rollouts."""


def prompts() -> list[tuple[str, str]]:
    """Each prompt, and what is right."""
    return [(f"{form} of {name}", says[place]) for form, says in FORMS.items() for place, name in enumerate(NUMBERS)]


def write_corpus(folder: Path) -> None:
    """Tokenizer and indexed file of answers in any form."""
    lines = [
        {"prompt": asked, "completion": says[place % len(NUMBERS)]}
        for place, (asked, _) in enumerate(prompts())
        for says in FORMS.values()
    ]
    texts = [text for line in lines for text in line.values()]
    train_sentencepiece(texts * 4, folder / "tokenizer", 300)
    (folder / "any.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_grit([folder / "any.jsonl"], folder / "any", folder / "tokenizer.model", workers=1)


def toy_config(folder: Path, toy: Toy) -> RunConfig:
    """The run that learns from answers in any form."""
    shape = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        max_position_embeddings=64,
        init_std=0.05,
    )
    config = RunConfig(model=shape)
    config.training.precision, config.training.seed, config.training.objective = "fp32", toy.seed, "generative"
    config.parallel.device = "cpu"
    config.data.tokenizer, config.data.generative = str(folder / "tokenizer.model"), [str(folder / "any")]
    config.data.tokens_per_row, config.training.generative_batch_size = 1024, 72
    config.optimizer.warmup_ratio = 0.0
    config.output_dir = str(folder / "run")
    return config


class Learner:
    """A model, what trains it, and what samples from it."""

    def __init__(self, folder: Path, toy: Toy, context: Any) -> None:
        from megatron_grit.inference.model import GritModel
        from megatron_grit.models.decoder import build_chunks
        from megatron_grit.training.optimizer import build_optimizer, wrap_chunks

        self.folder, self.toy, self.context = folder, toy, context
        self.config = toy_config(folder, toy)
        self.tokenizer = load_tokenizer(folder / "tokenizer.model")
        self.chunks = build_chunks(self.config, self.tokenizer.vocab_size, context)
        self.wrapped = wrap_chunks(self.chunks, False)
        self.optimizer = build_optimizer(self.config, self.wrapped)
        self.model = GritModel(self.config, self.chunks[0], self.tokenizer)

    def train(self, config: RunConfig, steps: range, lr: float) -> list[dict[str, float]]:
        """Take steps; their metrics."""
        from megatron_grit.data.rows.loader import GritDataLoader
        from megatron_grit.training.step import TrainStep

        loader = GritDataLoader(config, self.tokenizer, row_multiple=1, equal_rows=False)
        step = TrainStep(config, self.context, self.wrapped, self.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return [step(loader.batch(number)) for number in steps]

    def sample(self, seed: int) -> list[dict[str, Any]]:
        """Lines of rollouts without rewards."""
        from megatron_grit.config.options import SamplingOptions

        asked = prompts()
        ids = [self.model.completion_prompt(text) for text, _ in asked for _ in range(self.toy.n)]
        options = SamplingOptions(max_new_tokens=8, temperature=1.0, seed=seed)
        answers = iter(self.model.continue_prompts(ids, options))
        lines = []
        for text, right in asked:
            found = [next(answers) for _ in range(self.toy.n)]
            completions = [
                {"text": each.text, "token_ids": list(each.token_ids), "logprobs": list(each.log_probs)}
                for each in found
            ]
            prompt_ids = list(found[0].prompt_token_ids)
            lines.append({"prompt": text, "answer": right, "prompt_token_ids": prompt_ids, "completions": completions})
        return lines

    def improve(self, number: int, rewards_of: Callable[[str, str], float]) -> dict[str, float]:
        """A round of sampling and training; its reward, and metrics of its last step."""
        from megatron_grit.data.rollouts.build import build_rollouts
        from megatron_grit.data.rollouts.options import RolloutBuild

        lines = self.sample(seed=1000 * self.toy.seed + number)
        right = [exact(one["text"], line["answer"]) for line in lines for one in line["completions"]]
        for line in lines:
            for one in line["completions"]:
                one["reward"] = rewards_of(one["text"], line["answer"])
        path = self.folder / "round.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        build = RolloutBuild(tokenizer=str(self.folder / "tokenizer.model"), template="gritlm", overwrite=True)
        built = build_rollouts([path], self.folder / "round", build)
        config = deepcopy(self.config)
        config.training.objective, config.training.seed = "rollout", self.toy.seed + number
        knobs = option(config, "rollout")
        knobs.data, knobs.batch_size = [str(self.folder / "round")], built.num_completions // self.toy.updates
        for name, value in self.toy.options.items():
            setattr(knobs, name, value)
        metrics = self.train(config, range(self.toy.updates), self.toy.lr)[-1]
        return {"right": float(np.mean(right)), **metrics}


def exact(text: str, right: str) -> float:
    """1 where the answer is right."""
    return float(text.strip() == right)


def learn(folder: Path, toy: Toy, *, drawn: bool = False) -> list[dict[str, float]]:
    """Train from nothing; the rounds. ``drawn``: rewards are drawn."""
    from megatron_grit.parallel.launch import parallel_job

    random = np.random.default_rng(toy.seed)
    rewards_of = (lambda text, right: float(random.random() < 0.5)) if drawn else exact
    config = toy_config(folder, toy)
    with parallel_job(config.parallel, seed=toy.seed) as context:
        learner = Learner(folder, toy, context)
        learner.train(config, range(toy.base_steps), 3e-3)
        return [learner.improve(number, rewards_of) for number in range(toy.rounds)]


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """All variants and the control; prints a line for each."""
    write_corpus(folder)
    numbers: dict[str, Any] = {}
    met = True
    for name in arguments.variants:
        options = VARIANTS[name]
        toy = Toy(n=arguments.n, rounds=arguments.rounds, updates=arguments.updates, options=options)
        began, gains = time.perf_counter(), []
        for seed in range(1, arguments.seeds + 1):
            found = [each["right"] for each in learn(folder, replace(toy, seed=seed), drawn=name == "control")]
            first, last = found[0], float(np.mean(found[-3:]))
            gains.append(last - first)
            numbers[f"{name}/{seed}"] = {"first": first, "last": last, "rounds": found}
            print(f"{name}, seed {seed}: reward {first:.3f} at first, {last:.3f} in the last three rounds", flush=True)
        gain = numbers[name] = t_interval(gains)
        met = met and (max(gains) < TARGET if name == "control" else gain["mean"] >= TARGET)
        print(
            f"{name}: {gain['mean']:+.3f} +- {gain['half_interval']:.3f}, {min(gains):+.3f} to {max(gains):+.3f}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return numbers, met


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence"},
    "dapo": {"aggregation": "token", "clip_high": 0.28},
    "dr_grpo": {"aggregation": "constant", "completion_tokens": 8, "advantages": "mean"},
    "gspo": {"aggregation": "sequence", "ratio": "sequence", "clip_low": 3e-2, "clip_high": 4e-2},
    "control": {"aggregation": "sequence"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure. Returns the exit status."""
    parser = harness.parser(__doc__)
    parser.add_argument("--n", type=int, default=8, help="completions of a prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--updates", type=int, default=2, help="steps of a round (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    arguments = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    return harness.run("grpo_toy", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
