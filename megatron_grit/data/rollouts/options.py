"""Options of building rollouts, importable without numpy."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_grit.config.knob import Checked, knob


@dataclass(kw_only=True)
class RolloutBuild(Checked):
    """How completions become an indexed file."""

    tokenizer: str = knob(path=True)
    """Of the model that sampled: a run or checkpoint, SentencePiece .model, tokenizer.json, their folder, or a name on
    the hub."""
    template: str = knob("tokenizer", path=True)
    """Chat template of messages where a line has no prompt_token_ids: chatml, gritlm, llama2, tulu, zephyr, tokenizer
    for that of the checkpoint, or else the tokenizer's own, or a .yaml file. Ids that were sampled are better: text may
    be cut into other tokens."""
    max_length: int | None = knob(None, at_least=2)
    """Leave out completions that with their prompt are longer, in tokens. null: none."""
    drop_equal: bool = False
    """Leave out prompts whose completions all have one reward: they have no advantages, so they teach nothing (DAPO's
    dynamic sampling)."""
    overwrite: bool = False
    """Replace the files of an earlier build."""
