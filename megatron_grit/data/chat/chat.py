"""How a model converses: its template, what of it is a system message's place, and the tokens that end its answers.

A checkpoint holds these facts in ``chat.json``, whatever becomes of the data or the folder that they came from; what
generates, serves or exports a checkpoint reads them there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_grit.config.values import shortened
from megatron_grit.data.chat.chat_format import TOKENIZER, ChatFormat, probe
from megatron_grit.data.chat.chat_templates import TEMPLATES, BoundTemplate, ChatTemplate, find_template
from megatron_grit.data.chat.jinja_template import JinjaChatFormat, template_source
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.tokenizer import CHAT_FILE, Tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.files import write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

DEFAULT_TEMPLATE = "gritlm"
TemplateSource = str | dict[str, Any]
"""Jinja, or the fields of a :class:`ChatTemplate`."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The facts of ``chat.json``."""

    template: str
    """Name, as indexed files carry it."""
    source: TemplateSource
    """What the template is, so that no other file is needed."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer; the tokenizer's EOS is the first."""
    origin: str
    """Where the template was learned."""
    date: str | None = None
    """What ``strftime_now`` says in the data of this template, as in ISO 8601. None: it does not need it."""

    def bind(self, tokenizer: Tokenizer) -> ChatFormat:
        """The template with the ids of a tokenizer.

        Raises:
            ConfigError: jinja2 is not installed.
            DataError: no valid Jinja.
        """
        return bind_template(self.template, self.source, tokenizer)

    def date_of(self, given: str | None) -> datetime | None:
        """The date that a prompt is given. None: that of the day.

        Args:
            given: YYYY-MM-DD, "data" for that of the data, or None.

        Raises:
            ConfigError: it is none of these, or the data have no date.
        """
        if given == "data" and self.date is None:
            raise ConfigError(
                f"chat_date is data, and data of chat template {self.template} hold no date; leave it out"
            )
        try:
            text = self.date if given == "data" else given
            return None if text is None else datetime.strptime(text, "%Y-%m-%d")
        except ValueError:
            raise ConfigError(f'chat_date must be YYYY-MM-DD or "data", not {shortened(given)}') from None


def bind_template(name: str, source: TemplateSource, tokenizer: Tokenizer) -> ChatFormat:
    """A template with the ids of a tokenizer; arguments as of :class:`Chat`."""
    if isinstance(source, str):
        return JinjaChatFormat(tokenizer, source)
    return BoundTemplate(template_of(name, source), tokenizer)


def template_of(name: str, fields: dict[str, Any]) -> ChatTemplate:
    """A template by its fields, lists where JSON has no tuples."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return ChatTemplate(**values | {"name": name})


def fields_of(template: ChatTemplate) -> dict[str, Any]:
    """The fields of a template as JSON holds them."""
    fields = dataclasses.asdict(template)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def make_chat(
    name: str, source: TemplateSource, tokenizer: Tokenizer, origin: str, end_ids: Sequence[int] = ()
) -> Chat:
    """The facts of a model with a template.

    Args:
        name: as indexed files carry it.
        source: the template.
        tokenizer: the model's.
        origin: where it was learned.
        end_ids: further tokens that end an answer.
    """
    ends = [tokenizer.eos_id, *end_ids]
    chat_format = bind_template(name, source, tokenizer)
    pieces = probe(chat_format)
    of_answer = [value for role, value in pieces if role is Role.ANSWER]
    found = [value for value in of_answer[of_answer.index("b") if "b" in of_answer else 0 :] if isinstance(value, int)]
    if not found and (symbol := _symbol(tokenizer, str(of_answer[-1]).strip())) is not None:
        found = [symbol]
    if not found:
        log.warning(
            f"chat template {name}: what ends an answer, {str(of_answer[-1])!r}, is no token that {tokenizer.path} "
            f"keeps whole, so generation does not stop there; add it to the tokenizer's special tokens"
        )
    end_ids = tuple(dict.fromkeys(ends + found))
    return Chat(template=name, source=source, end_ids=end_ids, origin=origin, date=chat_format.date_in_data)


def _symbol(tokenizer: Tokenizer, text: str) -> int | None:
    """The token that a text is, whatever stands around it: a symbol that a SentencePiece model defines, or an added
    token that is not called special. None: there is none, or the text may be a word."""
    if len(text) < 3 or text[0].isalnum() or text[-1].isalnum():
        return None
    ids = [
        {index for index in tokenizer.encode(around.format(text)) if tokenizer.id_to_token(index) == text}
        for around in ("b{}b", "{}", " {} ", "<{}>", "\n{}.")
    ]
    common = set.intersection(*ids)
    return common.pop() if len(common) == 1 else None


def named_chat(name: str, tokenizer: Tokenizer, origin: str) -> Chat:
    """The facts of a model with a template that is asked for.

    Args:
        name: one of ``TEMPLATES``, "tokenizer" for the tokenizer's own, or a YAML file with the fields of
            :class:`ChatTemplate`.
        tokenizer: the model's.
        origin: who asks.

    Raises:
        ConfigError: no such template.
        DataError: the tokenizer has no template of its own.
    """
    return make_chat(*source_of(name, tokenizer), tokenizer, origin, _end_ids_beside(tokenizer, name))


def source_of(name: str, tokenizer: Tokenizer) -> tuple[str, TemplateSource]:
    """Name and source of a template that is asked for, as of :func:`named_chat`."""
    if name == TOKENIZER:
        chat_format = JinjaChatFormat(tokenizer)
        return chat_format.name, chat_format.source
    template = find_template(name)
    return template.name, fields_of(template)


def is_known(name: str, source: TemplateSource | None, tokenizer: Tokenizer) -> bool:
    """Whether the template of an indexed file is known: by its name, by its source, or as the tokenizer's own."""
    return source is not None or name in TEMPLATES or _is_own(name, tokenizer)


def chat_of_file(name: str, source: TemplateSource | None, tokenizer: Tokenizer) -> Chat:
    """The facts of a model that is trained on an indexed file with a template that :func:`is_known`."""
    if source is None and name in TEMPLATES:
        source = fields_of(TEMPLATES[name])
    if source is None:
        source = template_source(tokenizer)
    assert source is not None
    return make_chat(name, source, tokenizer, "training data", _end_ids_beside(tokenizer, name))


def _is_own(name: str, tokenizer: Tokenizer) -> bool:
    source = template_source(tokenizer)
    return source is not None and name == JinjaChatFormat.name_of(source)


def chat_beside(tokenizer: Tokenizer) -> Chat | None:
    """The facts that lie beside a tokenizer's file, in a checkpoint of ours or a Hugging Face folder: ``chat.json``, or
    the chat template and the ends that ``generation_config.json`` names. None: there are none.

    Raises:
        DataError: a file that cannot be read.
    """
    folder = tokenizer.path.parent
    found = read_chat(folder)
    source = template_source(tokenizer)
    if found is not None or source is None:
        return found
    return make_chat(
        JinjaChatFormat.name_of(source), source, tokenizer, "the tokenizer's chat template", _stated_ends(folder)
    )


def _end_ids_beside(tokenizer: Tokenizer, name: str) -> Sequence[int]:
    """Further ends of the tokenizer's own template; another template has its own alone."""
    own = name.partition(":")[0] == TOKENIZER
    return _stated_ends(tokenizer.path.parent) if own else ()


def _stated_ends(folder: Path) -> list[int]:
    """``eos_token_id`` of generation_config.json, a number or a list; of config.json where that file is missing, as in
    transformers."""
    path = next(
        (folder / name for name in ("generation_config.json", "config.json") if (folder / name).is_file()), None
    )
    if path is None:
        return []
    try:
        given = json.loads(path.read_bytes()).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"cannot be read ({error})", path=path) from None
    ends = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise DataError(f"eos_token_id is {given!r}; it must be a token id or a list of them", path=path)
    return ends


def default_chat(tokenizer: Tokenizer) -> Chat:
    """GritLM's template, of a model that nothing else is known of."""
    return named_chat(DEFAULT_TEMPLATE, tokenizer, "default")


def write_chat(chat: Chat, folder: Path) -> None:
    """Write ``chat.json``.

    Raises:
        OSError: it cannot be written.
    """
    facts = dataclasses.asdict(chat)
    write_json(folder / CHAT_FILE, {key: value for key, value in facts.items() if value is not None})


def read_chat(folder: Path) -> Chat | None:
    """What ``chat.json`` in a folder says. None: there is none, as in checkpoints of earlier versions.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / CHAT_FILE
    if not path.is_file():
        return None
    try:
        chat = Chat(**json.loads(path.read_bytes()))
        if not isinstance(chat.source, str | dict) or not all(isinstance(end, int) for end in chat.end_ids):
            raise ValueError("source or end_ids is none")
        chat.date_of(chat.date)
        return replace(chat, end_ids=tuple(chat.end_ids))
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise DataError(f"cannot be read ({error}); put it back from a copy", path=path) from None
