"""The chat template that comes with a tokenizer: Jinja, rendered in a sandbox, with roles found in what it wrote.

Each message is rendered between two private-use characters, so that it can be found again; the rendering without them
must be the rendering of the messages as they are, else the template has changed a message and the record is refused.
What the template wrote is split at the tokenizer's special tokens. What a message says never is.

An answer is what the model generates: it begins where the generation prompt ends, when nothing but white space is
between the two, and ends with the special token after it. The date is not given to templates, because a file that is
built twice must be the same; those that ask for it have a date of their own for that case.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_grit.data.chat.chat_format import TOKENIZER, Piece, join_completion
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.special import SpecialTokens
from megatron_grit.data.text.tokenizer import Tokenizer, read_settings, token_name
from megatron_grit.errors import ConfigError, DataError

_FIRST_MARK = 0xF0000  # the private-use plane A: 65,534 characters, two for each message
_MAX_MESSAGES = 32767
_ROLE = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ANSWER}
_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class JinjaChatFormat:
    """The template of a tokenizer. See :class:`~megatron_grit.data.chat.chat_format.ChatFormat`.

    Args:
        tokenizer: ``chat_template.jinja`` or ``tokenizer_config.json`` lies beside its file.
        source: another template, with the tokenizer's tokens.

    Raises:
        ConfigError: jinja2 is not installed.
        DataError: there is no template, or it is not Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        settings = read_settings(tokenizer.path)
        source = template_source(tokenizer) if source is None else source
        if source is None:
            raise DataError(
                "no chat_template here and no chat_template.jinja beside it; choose a template by name",
                path=tokenizer.path.with_name("tokenizer_config.json"),
            )
        self.name, self.source = self.name_of(source), source
        self._tokenizer = tokenizer
        self._names = {key: name for key in _TOKEN_KEYS if (name := token_name(settings.get(key))) is not None}
        self._names.setdefault("bos_token", tokenizer.id_to_token(tokenizer.bos_id))
        self._names.setdefault("eos_token", tokenizer.id_to_token(tokenizer.eos_id))
        self._template = _compile(source, tokenizer.path)
        ends = {self._names["bos_token"]: tokenizer.bos_id, self._names["eos_token"]: tokenizer.eos_id}
        self._special = SpecialTokens(tokenizer, ends)
        probe = [Message("user", "a"), Message("assistant", "b")]
        self._lead = self._find_lead(probe)
        self._has_bos = any(part == tokenizer.bos_id for _, part in self.pieces(probe))

    @staticmethod
    def name_of(source: str) -> str:
        """The name of a template in indexed files."""
        return f"{TOKENIZER}:{hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def _find_lead(self, messages: Sequence[Message]) -> str:
        """White space that the template writes between the generation prompt and an answer."""
        prompt = self.render(messages[:-1], add_generation_prompt=True)
        text, places = self._locate(messages, add_generation_prompt=False)
        lead = text[len(prompt) : places[-1][0]] if text.startswith(prompt) else ""
        return lead if lead.isspace() else ""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it.

        Raises:
            DataError: the template refuses it.
        """
        from jinja2 import TemplateError

        values = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=values,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the tokenizer's chat template refuses the conversation: {error}") from error

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        return self._split(messages, add_generation_prompt=False)

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        return self._split(messages, add_generation_prompt=True)

    def completion(self, prompt: str, completion: str) -> list[Piece]:
        bos: list[Piece] = [(Role.TEMPLATE, self._tokenizer.bos_id)] if self._has_bos else []
        return [*bos, *join_completion(prompt, completion), (Role.ANSWER, self._tokenizer.eos_id)]

    def _split(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Piece]:
        text, places = self._locate(messages, add_generation_prompt)
        pieces: list[Piece] = []
        position = 0
        open_answer = False
        for (start, stop), message in zip(places, messages, strict=True):
            lead = self._lead if message.role == "assistant" and text[position:start].endswith(self._lead) else ""
            self._add_template(pieces, self._special.split(text, position, start - len(lead)), open_answer)
            if lead:
                pieces.append((Role.ANSWER, lead))
            if start < stop:
                pieces.append((_ROLE[message.role], text[start:stop]))
            position, open_answer = stop, message.role == "assistant"
        self._add_template(pieces, self._special.split(text, position), open_answer)
        return pieces

    def _add_template(self, pieces: list[Piece], parts: list[str | int], open_answer: bool) -> None:
        """Append what the template wrote. Where an answer stands before it, up to its end token it is the answer's."""
        if open_answer:
            blank = 1 if parts and isinstance(parts[0], str) and not parts[0].strip() else 0
            index = parts[blank] if len(parts) > blank else ""
            if isinstance(index, str) or index == self._tokenizer.bos_id != self._tokenizer.eos_id:
                written = "".join(p if isinstance(p, str) else self._tokenizer.id_to_token(p) for p in parts)[:20]
                raise DataError(
                    f"the tokenizer's chat template writes {written!r} after an answer and not a special token, so "
                    "that no answer would have an end; choose another template"
                )
        else:
            blank = -1
        for place, value in enumerate(parts):
            repeated = value == self._tokenizer.bos_id and any(seen == value for _, seen in pieces)
            if repeated and place > blank and self._tokenizer.bos_id != self._tokenizer.eos_id:
                continue  # never more than one BOS
            pieces.append((Role.ANSWER if place <= blank else Role.TEMPLATE, value))

    def _locate(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and where each message stands in it."""
        if len(messages) > _MAX_MESSAGES:
            raise DataError(f"the conversation has {len(messages)} messages; {_MAX_MESSAGES} is the most")
        plain = self.render(messages, add_generation_prompt=add_generation_prompt)
        # A template that trims its messages takes the marks for text and keeps the white space next to them; then
        # the marks have to stand within that white space.
        for mark in (_mark_outside, _mark_inside):
            marked = [Message(message.role, mark(index, message.content)) for index, message in enumerate(messages)]
            found = self._find_marks(self.render(marked, add_generation_prompt=add_generation_prompt), plain, messages)
            if found is not None:
                return plain, found
        raise DataError("the tokenizer's chat template changes, repeats or leaves out what a message says")

    def _find_marks(self, text: str, plain: str, messages: Sequence[Message]) -> list[tuple[int, int]] | None:
        marks = list(_MARK.finditer(text))
        expected = [chr(_FIRST_MARK + number) for number in range(2 * len(messages))]
        if [mark.group() for mark in marks] != expected or _MARK.sub("", text) != plain:
            return None
        ends = [mark.start() - number for number, mark in enumerate(marks)]
        places = list(zip(ends[::2], ends[1::2], strict=True))
        for (start, stop), message in zip(places, messages, strict=True):
            if plain[start:stop].strip() != message.content.strip():
                return None
        return places


_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + 2 * _MAX_MESSAGES)}]")


def _mark_outside(index: int, content: str) -> str:
    return chr(_FIRST_MARK + 2 * index) + content + chr(_FIRST_MARK + 2 * index + 1)


def _mark_inside(index: int, content: str) -> str:
    core = content.strip()
    start = len(content) - len(content.lstrip()) if core else 0
    return content[:start] + _mark_outside(index, core) + content[start + len(core) :]


def template_source(tokenizer: Tokenizer) -> str | None:
    """The chat template that came with a tokenizer, as Jinja. None: there is none."""
    path = tokenizer.path.with_name("chat_template.jinja")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = read_settings(tokenizer.path).get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _compile(source: str, path: Path) -> Any:
    """The compiled template, with what transformers gives to chat templates."""
    try:
        from jinja2 import TemplateError, TemplateSyntaxError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ConfigError(
            "a tokenizer's own chat template needs jinja2; install it with: pip install jinja2"
        ) from error

    class Generation(Extension):
        """``{% generation %}`` marks answers for other tools; here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: object, indent: int | None = None, **_: object) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise DataError(f"its chat template is not Jinja: {error}", path=path) from error
