"""Both ways between Hugging Face models and checkpoints, by one set of options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_grit.config.checkpoint_folder import holds_checkpoint, resolve_checkpoint
from megatron_grit.config.knob import Checked, knob
from megatron_grit.convert.megatron_in.folder import find_legacy
from megatron_grit.errors import ConfigError
from megatron_grit.store.logs import get_logger, say_loading

log = get_logger(__name__)


@dataclass(kw_only=True)
class ConvertOptions(Checked):
    """What is converted, and how."""

    source: str = knob(flag="from", path=True)
    """Hugging Face model, checkpoint or run directory."""
    target: str = knob(flag="to", path=True)
    """Directory to write."""
    tokenizer: str | None = knob(None, path=True)
    """File or directory of the tokenizer. null: the one of --from."""
    revision: str | None = knob(None, only="import")
    """Import: branch, tag or commit on the hub."""
    allow_pickle: bool = knob(False, only="import")
    """Import: read tensors from *.bin, and nothing else."""
    vocab_size: int | None = knob(None, only="import", at_least=1)
    """Import: add tokens up to so many, each the mean of the others."""
    max_shard_size: str = knob("5GB", only="export")
    """Export: largest weight file."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = knob("keep", only="export")
    """Export: type of the weights."""
    merge: Literal["trained", "original"] | None = knob(None, only="export", alone="trained")
    """Export of adapters: in one model with their base; after adapter.quantize, in the 4 bits that they were trained
    beside, or original: in the base as it was read."""
    adapter_only: bool = knob(False, only="export")
    """Export of adapters: as PEFT loads them."""
    base: str | None = knob(None, only="export", path=True)
    """With --merge: where the base is now, if not where the run read it."""


def convert(options: ConvertOptions) -> Path:
    """Convert whichever way the source says. Returns the directory that is written.

    Raises:
        ConfigError: an option of the other way.
        CheckpointError: see :func:`~megatron_grit.convert.hf_in.convert.convert_checkpoint` and
            :func:`~megatron_grit.convert.hf_out.convert.export_checkpoint`.
    """
    source, settings = Path(options.source), vars(options).copy()
    way = "export" if holds_checkpoint(source) else "import"
    is_legacy = way == "import" and find_legacy(source) is not None
    for field in dataclasses.fields(options):
        if field.metadata.get("only", way) != way and settings.pop(field.name) != field.default:
            why = "is a checkpoint, which is exported" if way == "export" else "holds no checkpoint of ours to export"
            raise ConfigError(f"{source} {why}; --{field.name.replace('_', '-')} has no meaning here, leave it out")
    if options.adapter_only and options.merge:
        raise ConfigError("--merge and --adapter-only exclude each other; give one of them")
    if is_legacy and (options.revision or options.vocab_size or options.allow_pickle):
        raise ConfigError(f"{source} is of Megatron-LM's older layout; it takes --tokenizer and no other option")
    paths = settings.pop("source"), settings.pop("target")
    if way == "export":
        resolve_checkpoint(source)
    say_loading()
    if is_legacy:
        from megatron_grit.convert.megatron_in.convert import convert_legacy

        log.info(f"importing {source}, of Megatron-LM's older layout")
        return convert_legacy(*paths, settings["tokenizer"])
    if way == "import":
        from megatron_grit.convert.hf_in.convert import convert_checkpoint

        log.info(f"importing {source}")
        return convert_checkpoint(*paths, **settings)
    from megatron_grit.convert.hf_out.convert import export_checkpoint
    from megatron_grit.convert.peft.merge import export_adapter

    log.info(f"exporting {source}")
    if settings.pop("adapter_only"):
        return export_adapter(*paths)
    return export_checkpoint(*paths, adapters=settings.pop("merge"), **settings)
