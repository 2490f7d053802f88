"""The chat template that comes with a tokenizer: Jinja, rendered in a sandbox, with roles found in what it wrote.

Each message is rendered between two private-use characters, so that it can be found again; the rendering without them
must be the rendering of the messages as they are, else the template has changed a message and the record is refused.
What the template wrote is split at the tokenizer's special tokens. What a message says never is. Where the template
reads ``<think>`` or ``<tool_response>`` in a message, these tags are the template's, and what they hold is the message.

An answer is what the model generates: it begins where the generation prompt ends, when nothing but white space is
between the two, and ends with the special token after it. Some templates write an answer otherwise once another turn
follows: Qwen3's leaves its ``<think>`` part out. Of these no rendering holds two answers as the model generates them,
so only the last one of a rendering is supervised: all that follows the generation prompt. The others are rendered for
themselves (:func:`~megatron_grit.data.chat.chat_format.renderings`), and so are those of conversations with tool calls,
reasoning beside the content, or whatever else the template writes of an answer: what it makes of that is found there.

``strftime_now`` gives a prompt today's date, as in transformers. In data the date may not change, because a file that
is built twice must be the same: templates that have a date of their own for where there is no ``strftime_now`` use it,
the others :data:`DATE_IN_DATA`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_grit.data.chat.chat_format import PROBES, TOKENIZER, ChatFormat, Piece, join_completion, probe
from megatron_grit.data.chat.message_keys import check_keys, strings
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import RESULT_ROLES, TEMPLATE_KEYS, Message
from megatron_grit.data.text.special import SpecialTokens
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.data.text.tokenizer_settings import read_settings, token_name
from megatron_grit.errors import ConfigError, DataError

DATE_IN_DATA = datetime(2024, 7, 26)
"""The date that templates without one of their own write into data, whenever it is built."""
_FIRST_MARK = 0xF0000  # the private-use plane A: 65,534 characters, up to four for each message
_MAX_MESSAGES = 16383
_ROLE = {"system": Role.SYSTEM, "assistant": Role.ANSWER} | dict.fromkeys({"user"} | RESULT_ROLES, Role.USER)
_NOW = "strftime_now"
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
        self._template, self.read = _compile(source, tokenizer.path)
        self._tools: Sequence[Any] | None = None
        ends = {self._names["bos_token"]: tokenizer.bos_id, self._names["eos_token"]: tokenizer.eos_id}
        self._special = SpecialTokens(tokenizer, ends)
        self._date_in_data: datetime | None = None
        self._date_in_data = None if self._has_own_date() else DATE_IN_DATA
        self.date_in_data = None if self._date_in_data is None else self._date_in_data.date().isoformat()
        self.rewrites = False
        self.rewrites = any(self._rewrites([Message("user", "a"), Message("assistant", one)]) for one in PROBES)
        self._lead = "" if self.rewrites else self._find_lead([Message("user", "a"), Message("assistant", "b")])
        self._has_bos = any(part == tokenizer.bos_id for _, part in probe(self))

    @staticmethod
    def name_of(source: str) -> str:
        """The name of a template in indexed files."""
        return f"{TOKENIZER}:{hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def _has_own_date(self) -> bool:
        """Whether the template does without ``strftime_now``."""
        try:
            self.render([Message("user", "a"), Message("assistant", "b")])
        except DataError as error:
            return _NOW not in str(error)
        return True

    def _rewrites(self, turn: Sequence[Message]) -> bool:
        """Whether the template writes the answer of a turn otherwise once another turn follows."""
        try:
            text, places = self._locate(turn, add_generation_prompt=False)
            return not self.render([*turn, *turn]).startswith(text[: places[-1].stop])
        except DataError:
            return False  # a conversation of this kind is refused when it comes

    def _find_lead(self, messages: Sequence[Message]) -> str:
        """White space that the template writes between the generation prompt and an answer."""
        prompt = self.render(messages[:-1], add_generation_prompt=True)
        text, places = self._locate(messages, add_generation_prompt=False)
        lead = text[len(prompt) : places[-1].start] if text.startswith(prompt) else ""
        return lead if lead.isspace() else ""

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, date: datetime | None = None
    ) -> str:
        """The conversation as the template writes it.

        Args:
            messages: of the conversation.
            add_generation_prompt: end with the beginning of an answer.
            date: what ``strftime_now`` says. None: as in data.

        Raises:
            DataError: the template refuses it.
        """
        from jinja2 import TemplateError

        values = [{"role": message.role, "content": message.content, **self._more(message)} for message in messages]
        now = date or self._date_in_data
        clock = {} if now is None else {_NOW: now.strftime}
        try:
            return self._template.render(
                messages=values,
                tools=self._tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
                **clock,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the tokenizer's chat template refuses the conversation: {error}") from error

    def of(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> ChatFormat:
        check_keys(messages, tools, self.read, self.name)
        held = [self._more(message) for message in messages]
        for text in strings([*held, *(tools or ())]):
            if not all(isinstance(part, str) for part in self._special.split(text)):
                raise DataError(
                    f"tools, calls or reasoning hold {text[:60]!r}, where the template's text has a special token; "
                    "leave the record out"
                )
        if not tools:
            return self
        other = copy.copy(self)
        other._tools = list(tools)
        return other

    def by_answer(self, messages: Sequence[Message]) -> bool:
        keys = TEMPLATE_KEYS | {"content"}
        if self.rewrites or any(one.role in RESULT_ROLES or keys & self._more(one).keys() for one in messages):
            return True
        # Of other keys no name tells what they are: ``name`` of a call is read in many templates, of a message in few.
        bare = [one._replace(more=None) if one.role == "assistant" and self._more(one) else one for one in messages]
        return bare != list(messages) and self.render(bare) != self.render(messages)

    def _more(self, message: Message) -> dict[str, Any]:
        """What the template reads of a message beside role and content."""
        more = message.more or {}
        return {key: value for key, value in more.items() if key in self.read or key == "content"}

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        if self.by_answer(messages):  # what follows the last answer may change it
            messages = messages[: 1 + max(place for place, one in enumerate(messages) if one.role == "assistant")]
        return self._split(messages, add_generation_prompt=False)

    def prompt(self, messages: Sequence[Message], date: datetime | None = None) -> list[Piece]:
        return self._split(messages, add_generation_prompt=True, date=date or datetime.now())

    def completion(self, prompt: str, completion: str) -> list[Piece]:
        bos: list[Piece] = [(Role.TEMPLATE, self._tokenizer.bos_id)] if self._has_bos else []
        return [*bos, *join_completion(prompt, completion), (Role.ANSWER, self._tokenizer.eos_id)]

    def _split(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, date: datetime | None = None
    ) -> list[Piece]:
        text, places = self._locate(messages, add_generation_prompt, date)
        begins = {} if add_generation_prompt else self._begins(messages, text, places)
        places += [_Place(number, begin, begin) for number, begin in begins.items() if not _says(messages[number])]
        pieces: list[Piece] = []
        position, answering = 0, -1
        for place in places:
            if place.message == answering:  # its reasoning stood before
                pieces += [(Role.ANSWER, part) for part in self._special.split(text, position, place.start)]
            else:
                begin = begins.get(place.message, place.start)
                self._add_template(pieces, self._special.split(text, position, begin), answering >= 0)
                pieces += [(Role.ANSWER, part) for part in self._special.split(text, begin, place.start)]
                answering = place.message if place.message in begins else -1
            if place.start < place.stop:
                role = _ROLE[messages[place.message].role]
                pieces.append((Role.TEMPLATE if role is Role.ANSWER and answering < 0 else role, place.text(text)))
            position = place.stop
        rest = self._special.split(text, position)
        if answering >= 0 and self._more(messages[answering]) and self.by_answer(messages):
            self._add_calls(pieces, rest)
        else:
            self._add_template(pieces, rest, answering >= 0)
        return pieces

    def _add_calls(self, pieces: list[Piece], parts: list[str | int]) -> None:
        """Append the rest of a last answer that says more than its content: all up to its end token is the answer's."""
        end = max((place for place, value in enumerate(parts) if not isinstance(value, str)), default=-1)
        after = "".join(str(value) for value in parts[end + 1 :])
        if end < 0 or after.strip():
            raise DataError(
                f"the tokenizer's chat template ends an answer with {after[:20]!r} and not with a special token; "
                "choose another template"
            )
        pieces += [(Role.ANSWER if place <= end else Role.TEMPLATE, value) for place, value in enumerate(parts)]

    def _begins(self, messages: Sequence[Message], text: str, places: Sequence[_Place]) -> dict[int, int]:
        """Where each supervised answer begins in the rendering, by the number of its message."""
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        begins: dict[int, int] = {}
        only_last = self.by_answer(messages)
        for number in answers[-1:] if only_last else answers:
            before = max((place.stop for place in places if place.message < number), default=0)
            start = next((place.start for place in places if place.message == number), None)
            if only_last and not _says(messages[number]):
                start = len(text)
            if start is None:
                raise DataError(f"answer {len(begins) + 1} of the conversation holds nothing but tags")
            if not only_last:
                begins[number] = start - (len(self._lead) if text[before:start].endswith(self._lead) else 0)
                continue
            prompt = self.render(messages[:number], add_generation_prompt=True)
            if not text.startswith(prompt) or not before <= len(prompt) <= start:
                raise DataError(
                    f"the tokenizer's chat template asks for an answer with {prompt[-30:]!r} and does not write this "
                    "answer behind that, so that the model would be trained otherwise than it is asked; write the "
                    "answer as the model has to generate it, or choose another template"
                )
            begins[number] = len(prompt)
        return begins

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

    def _locate(
        self, messages: Sequence[Message], add_generation_prompt: bool, date: datetime | None = None
    ) -> tuple[str, list[_Place]]:
        """The rendering, and where what each message says stands in it."""
        if len(messages) > _MAX_MESSAGES:
            raise DataError(f"the conversation has {len(messages)} messages; {_MAX_MESSAGES} is the most")
        plain = self.render(messages, add_generation_prompt=add_generation_prompt, date=date)
        # A template that trims its messages takes the marks for text and keeps the white space next to them; then
        # the marks have to stand within that white space. One that looks for tags has to find them where they were.
        ways = (_within_tags, _whole, _trimmed) if self.rewrites else (_whole, _trimmed, _within_tags)
        for parts_of in ways:
            marked, said = _mark(messages, parts_of)
            found = _find_marks(
                self.render(marked, add_generation_prompt=add_generation_prompt, date=date), plain, said
            )
            if found is not None:
                return plain, found
        raise DataError("the tokenizer's chat template changes, repeats or leaves out what a message says")


@dataclass(frozen=True, slots=True)
class _Said:
    """Something that a message says."""

    message: int
    text: str
    is_reasoning: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """Where something that a message says stands in a rendering."""

    message: int
    start: int
    stop: int

    def text(self, rendering: str) -> str:
        return rendering[self.start : self.stop]


_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + 4 * _MAX_MESSAGES)}]")
_REASONED = re.compile(r"(\s*<think>)(.*)(</think>)(.*)", re.DOTALL)
_TOOL_RESPONSE = re.compile(r"(<tool_response>)(.*)(</tool_response>\s*)", re.DOTALL)


def _whole(message: Message) -> list[str]:
    """What a message says, at odd places, between what is around it. All ways to cut it give such lists."""
    return ["", message.content, ""]


def _trimmed(message: Message) -> list[str]:
    return _trim(["", message.content, ""])


def _within_tags(message: Message) -> list[str]:
    pattern = {"assistant": _REASONED, "user": _TOOL_RESPONSE}.get(message.role)
    match = pattern.fullmatch(message.content) if pattern else None
    if match is None or message.content.count("</think>") > 1:
        return _trimmed(message)
    return _trim([*match.groups(), *([""] if len(match.groups()) % 2 == 0 else [])])


def _trim(parts: list[str]) -> list[str]:
    """With the white space around what is said moved out of it."""
    parts = list(parts)
    for place in range(1, len(parts), 2):
        text = parts[place]
        core = text.strip()
        start = len(text) - len(text.lstrip()) if core else 0
        parts[place - 1] += text[:start]
        parts[place], parts[place + 1] = core, text[start + len(core) :] + parts[place + 1]
    return parts


def _says(message: Message) -> bool:
    """Whether its content is something, or all that it says."""
    return bool(message.content or not message.more)


def _mark(messages: Sequence[Message], parts_of: Callable[[Message], list[str]]) -> tuple[list[Message], list[_Said]]:
    """The messages with marks around what they say, two for each entry of the list."""
    marked: list[Message] = []
    said: list[_Said] = []
    for number, message in enumerate(messages):
        if not _says(message):
            marked.append(message)
            continue
        parts = parts_of(message)
        for place in range(1, len(parts), 2):
            if parts[place] or len(parts) == 3:
                first = _FIRST_MARK + 2 * len(said)
                said.append(_Said(number, parts[place], is_reasoning=place + 2 < len(parts)))
                parts[place] = chr(first) + parts[place] + chr(first + 1)
        marked.append(message._replace(content="".join(parts)))
    return marked, said


def _find_marks(text: str, plain: str, said: Sequence[_Said]) -> list[_Place] | None:
    """Where the marks stand, counted without them. None: one is missing that is not around an earlier answer's
    reasoning, or the rendering is another than that of the messages without marks."""
    marks = list(_MARK.finditer(text))
    numbers = [ord(mark.group()) - _FIRST_MARK for mark in marks]
    found = numbers[::2]
    if numbers != sorted(set(numbers)) or numbers[1::2] != [number + 1 for number in found]:
        return None
    missing = {*range(len(said))} - {number // 2 for number in found}
    last = max((one.message for one in said), default=-1)
    if any(not said[number].is_reasoning or said[number].message == last for number in missing):
        return None
    if any(number % 2 for number in found) or _MARK.sub("", text) != plain:
        return None
    ends = [mark.start() - number for number, mark in enumerate(marks)]
    places = [
        _Place(said[number // 2].message, start, stop)
        for number, start, stop in zip(found, ends[::2], ends[1::2], strict=True)
    ]
    for number, place in zip(found, places, strict=True):
        if place.text(plain).strip() != said[number // 2].text.strip():
            return None
    return places


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


def _compile(source: str, path: Path) -> tuple[Any, frozenset[str]]:
    """The compiled template, with what transformers gives to chat templates, and all names and texts in it."""
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
        tree = environment.parse(source)
        compiled = environment.from_string(tree)
    except TemplateSyntaxError as error:
        raise DataError(f"its chat template is not Jinja: {error}", path=path) from error
    named = {str(node.attr) for node in tree.find_all(nodes.Getattr)}
    named |= {str(node.value) for node in tree.find_all(nodes.Const)}
    named |= {str(node.name) for node in tree.find_all(nodes.Name)}
    return compiled, frozenset(named)
