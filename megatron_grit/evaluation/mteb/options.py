"""Options of an evaluation by mteb; imports neither it nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import Checked, knob


@dataclass(kw_only=True)
class MtebOptions(Checked):
    """What is evaluated, and how texts are embedded."""

    tasks: list[str] = knob(["quick"])
    """Names of mteb's tasks, or suites: quick (12 tasks) and english (56)."""
    data_folder: str | None = knob(None, path=True)
    """Folder with a folder for each task, named as it, that holds its data set: as at Hugging Face, or as BEIR's. null:
    mteb fetches what is not in the cache of Hugging Face."""
    instructions: str = knob("e5", path=True)
    """e5, medi2, none, or a YAML file: what texts of each task are embedded for."""
    template: str | None = knob(None)
    """own, instruct ("Instruct: ... Query: ..."), or a text with {instruction} that is put in front. null: what the
    instructions say."""
    num_shots: int = knob(0, at_least=0, at_most=1)
    """1: append an example to each instruction."""
    normalize: Literal["auto", "true", "false"] = "auto"
    """Whether vectors have length 1. auto: as the model was trained."""
    languages: list[str] | None = knob(["eng"])
    """Evaluate subsets that are all of these languages. null: all subsets."""
