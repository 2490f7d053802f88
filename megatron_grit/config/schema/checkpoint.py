"""Saving and loading."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and loading."""

    load: str | None = knob(None, path=True)
    """Checkpoint to start from: weights only, optimizer and step start afresh. One of ours, the output_dir of a run, or
    what Megatron-LM wrote with --ckpt-format torch_dist."""
    resume: bool = True
    """Go on from the newest checkpoint under output_dir, if there is one."""
    same_data: bool = True
    """Refuse to go on where the next step's records are not those that the checkpoint announced: data files, blend,
    batch sizes or seed are others. false: they were changed on purpose."""
    save_interval: int = knob(500, at_least=0)
    """Steps between checkpoints; one is always written at the end. 0: none but the last."""
    keep: int = knob(2, at_least=0)
    """Newest checkpoints that are kept. 0: all."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; training waits only for a copy of the state, which takes as much of the
    host's memory as the checkpoint does on disk. The last checkpoint of a run is always waited for. false: write, then
    train on."""
