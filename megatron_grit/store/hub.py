"""Models of the Hugging Face hub by their names, fetched into the cache of huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_grit.errors import CheckpointError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_SUFFIXES = (".model", ".json", ".jinja", ".yaml", ".safetensors")
_TOKENIZER_FILES = [
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
]
_SMALL_FILES = ["config.json", "generation_config.json", *_TOKENIZER_FILES]
_MODULE_FILES = ["modules.json", "config_sentence_transformers.json", "sentence_*_config.json"]
_MODULE_FILES += [f"[0-9]*_*/{name}" for name in (*_SMALL_FILES, "sentence_*_config.json")]
_MODULE_FILES += ["[1-9]*_*/model.safetensors"]
"""Of sentence-transformers: its modules' folders are named 0_Transformer, 1_Pooling, 2_Dense and so on."""
_SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
_OTHER_FILES = ["[!0-9]*/*", "consolidated*"]
"""Also matched by the patterns, and not wanted: other folders, and the same weights in Mistral's own layout."""
_PICKLE = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def is_hub_name(source: str | Path) -> bool:
    """Whether ``source`` is to be looked for on the hub: organisation/name or organisation/name@revision,
    and nothing of that name is here."""
    name = str(source).partition("@")[0]
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_FILE_SUFFIXES) and not Path(source).exists()


def local_folder(
    source: str | Path, revision: str | None = None, *, weights: bool = True, allow_pickle: bool = False
) -> Path:
    """A model's local directory; a model named by its id is downloaded from the Hugging Face hub.

    Only the configuration, the tokenizer's files, the chat template and the weights are downloaded, into
    huggingface_hub's cache.

    Args:
        source: a directory, or ``organisation/name`` or ``organisation/name@revision`` where there is none.
        revision: branch, tag or commit on the hub.
        weights: whether weights are needed, too.
        allow_pickle: also download pickled weights.

    Raises:
        CheckpointError: there is no such directory, and the model cannot be downloaded.
    """
    if Path(source).is_dir() and revision is None:
        return Path(source)
    name, _, named = str(source).partition("@")
    if named and revision not in (None, named):
        raise CheckpointError(f"{source}: revision {revision} is asked for as well; give one of them")
    revision = named or revision
    if Path(name).is_dir():
        raise CheckpointError(f"{name}: is a directory, which has no revision {revision}; leave it out")
    if not is_hub_name(source):
        return Path(source)  # whoever reads it says what is missing
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{name}: is no directory here, and the Hugging Face hub cannot be asked without huggingface_hub; "
            "pip install huggingface_hub, or give a directory"
        ) from None
    # All that says something about a model beside its weights: a name on the hub means what its directory does.
    patterns = _SMALL_FILES + _MODULE_FILES
    if weights:
        patterns = patterns + _SAFETENSORS + (_PICKLE if allow_pickle else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_FILES))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the model is not in the cache; download it where there is a network"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
    at = f" at revision {revision}" if revision else ""
    raise CheckpointError(f"{name}: is no directory here, and not to be had from the Hugging Face hub{at}: {reason}")
