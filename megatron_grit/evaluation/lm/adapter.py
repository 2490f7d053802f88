"""Our models as lm-eval's harness asks them: log-probabilities and text, from token ids.

``lm_eval --model megatron-grit --model_args checkpoint=FOLDER`` finds the class by the entry point ``lm_eval.models``,
in versions of lm-eval that read entry points; ``python -m megatron_grit.evaluation.lm`` is that command in all of them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_grit.config.commands import suggestion
from megatron_grit.config.knob import check_values
from megatron_grit.config.options import HarnessModel, MeshSizes
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.data.text.records import Message
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.lm.answer_store import AnswerStore
from megatron_grit.evaluation.lm.harness import import_lm_eval
from megatron_grit.evaluation.lm.prompt_tokens import PromptTokens, check_bos
from megatron_grit.evaluation.lm.requests import Prompt, RequestRunner, Score
from megatron_grit.inference.model import GritModel

try:
    from lm_eval.api.model import TemplateLM
except ImportError:
    TemplateLM = object  # what needs it refuses in __init__

log = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 256
"""Where a task says nothing, as of lm-eval's own models."""
_SAMPLING = ("temperature", "top_p", "top_k")
_READ = {"do_sample", "until", "max_gen_toks", *_SAMPLING}


class MegatronGritLM(TemplateLM):  # type: ignore[misc]
    """One of our models, or a Hugging Face folder, for lm-eval.

    Contexts and continuations become tokens as in lm-eval's backend for Hugging Face models; no text gets a second BOS.
    That backend's rolling log-likelihood has one more where its tokenizer adds BOS by itself, which is left out here.

    Args:
        checkpoint: checkpoint, run or Hugging Face folder.
        batch_size: prompts that are continued together, where the harness says so; "auto" leaves it to ``at_once``.
        max_batch_size: not needed.
        options: of :class:`~megatron_grit.config.options.HarnessModel`.

    Raises:
        GritError: an option that there is not, or a model that cannot be loaded on this mesh.
    """

    def __init__(
        self, checkpoint: str, batch_size: int | str | None = None, max_batch_size: int | None = None, **options: Any
    ) -> None:
        import_lm_eval(allow_downloads=True)  # refuses where it is missing; what may be fetched is not decided here
        super().__init__()
        known = {field.name for field in fields(HarnessModel)}
        for name in options:
            if name not in known:
                raise ConfigError(f"model argument {name} is not known{suggestion(name, known)}")
        if str(batch_size).isdecimal():
            options["at_once"] = int(str(batch_size))
        if options.get("device") not in ("auto", "cpu", "cuda"):  # the harness gives "cuda:0"
            options["device"] = str(options.get("device") or "auto").partition(":")[0]
        self.take(HarnessModel(checkpoint=checkpoint, **options))

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> MegatronGritLM:
        """As of lm-eval's models, but that the arguments of the model count before what the command says beside them,
        which names a device in any case."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**given | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> MegatronGritLM:
        """As :meth:`create_from_arg_obj`, of ``name=value,name=value``."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def leading(cls, options: HarnessModel) -> MegatronGritLM:
        """For the command, in whose job the first process runs the harness and the others follow."""
        import_lm_eval(allow_downloads=True)
        made = cls.__new__(cls)
        super(cls, made).__init__()
        made.take(options, leads=True)
        return made

    @classmethod
    def of_model(cls, model: GritModel, options: HarnessModel) -> MegatronGritLM:
        """For a model that is there, in whose job the first process runs the harness and the others follow."""
        import_lm_eval(allow_downloads=True)
        made = cls.__new__(cls)
        super(cls, made).__init__()
        made.use(model, options, leads=True)
        return made

    def take(self, options: HarnessModel, leads: bool = False) -> None:
        """Load the model. All processes of the job call this."""
        check_values(options)
        mesh = {field.name: getattr(options, field.name) for field in fields(MeshSizes)}
        model = GritModel.load(
            options.checkpoint,
            device=options.device,
            precision=options.precision,
            base=options.base,
            parallel=ParallelConfig(**mesh),
            chat_template=options.chat_template,
            chat_date=options.chat_date,
        )
        self.use(model, options, leads)

    def use(self, model: GritModel, options: HarnessModel, leads: bool = False) -> None:
        """Ask this model."""
        self.model = model
        self.prompt_tokens = PromptTokens(self.model.tokenizer, options.add_bos_token)
        self.runner = RequestRunner(self.model, batch_tokens=options.batch_tokens, at_once=options.at_once, leads=leads)
        positions = self.model.config.model.max_position_embeddings
        self.max_length = min(options.max_length or positions, positions)
        self._device = self.model.model.context.device
        self._chat_format = self.model.chat.bind(self.model.tokenizer)
        self._encode = lru_cache(maxsize=1 << 14)(self._encode_anew)
        self.store: AnswerStore | None = None

    def keep_answers(self, folder: Path, identity: dict[str, Any]) -> None:
        """Write answers as they come, and take those that are there.

        Args:
            folder: for them.
            identity: of the model.

        Raises:
            DataError: the folder holds answers of another model.
        """
        settings = {"max_length": self.max_length, "add_bos_token": self.prompt_tokens.adds_bos}
        self.store = AnswerStore(folder, identity | settings)

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self.prompt_tokens.prefix_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer, where the task says nothing."""
        return _MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Of tokenizer and template, for the harness's cache of prompts."""
        return f"{self.model.chat.template}-{self.model.tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's template, which results are marked with. None: none is applied.

        Raises:
            ConfigError: another one is asked for; it is an argument of the model.
        """
        if isinstance(chat_template, str):
            raise ConfigError(f"the chat template is an argument of the model: chat_template={chat_template}")
        source = self.model.chat.source
        if not chat_template:
            return None
        return source if isinstance(source, str) else json.dumps(source, sort_keys=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's template, up to where its answer begins; or with the beginning of that answer,
        which is then the last message. A system message that the template has no place for is left out.

        Raises:
            DataError: the template refuses the conversation.
        """
        messages = [Message(each["role"], each["content"]) for each in chat_history]
        begun = "" if add_generation_prompt else messages.pop().content
        try:
            return self._written(messages) + begun
        except DataError:
            if all(message.role != "system" for message in messages):
                raise
            log.warning("the chat template has no place for a system message, which is left out")
            return self._written([message for message in messages if message.role != "system"]) + begun

    def _written(self, messages: Sequence[Message]) -> str:
        pieces = self._chat_format.of(messages).prompt(messages, self.model.chat_date)
        name = self.model.tokenizer.id_to_token
        return "".join(value if isinstance(value, str) else name(value) for _, value in pieces)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; ``add_special_tokens`` false leaves BOS out."""
        return list(self._encode(string, add_special_tokens))

    def _encode_anew(self, text: str, add_bos: bool | None) -> tuple[int, ...]:
        return tuple(self.prompt_tokens.encode(text, add_bos))

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [(total, greedy) for total, greedy in self._scored([(ctx, cont) for _, ctx, cont in requests])]

    def _scored(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Any]:
        """Sum of log-probabilities of each continuation, and whether its tokens are the likeliest."""
        asked = []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a continuation has {len(continuation)} tokens, and the model reads {self.max_length}; leave its "
                    "task out"
                )
            inputs = [*context, *continuation][-(self.max_length + 1) :]
            check_bos(inputs, self.model.tokenizer.bos_id)
            asked.append(Score(tuple(inputs), len(continuation)))
        return self._complete("loglikelihood", asked, lambda some: self.runner.score(some))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, after the prefix token. A longer text than the model reads is read in
        windows, each token with as much before it as fits at the end of a window."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            own = get_rolling_token_windows(
                ids[ids[:1] == [self.prefix_token_id] :], self.prefix_token_id, self.max_length, context_len=1
            )
            before = len(windows)
            windows += map(make_disjoint_window, own)
            counts.append(len(windows) - before)
        scores = iter(self._scored(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to the first of the task's stop texts. A prompt that leaves too little
        room is cut in front. Repeated prompts that are sampled have seeds of their own.

        Raises:
            DataError: an answer may be longer than the model reads.
        """
        repeats = Counter[Prompt]()
        prompts = []
        for request in requests:
            prompt = self._prompt(*request.args[:2])
            if prompt.temperature > 0:
                repeats[prompt] += 1
                prompt = Prompt(**vars(prompt) | {"seed": repeats[prompt] - 1})
            prompts.append(prompt)
        return self._complete("generate", prompts, lambda some: self.runner.generate(some))

    def _prompt(self, context: str, settings: dict[str, Any]) -> Prompt:
        from lm_eval.models.utils import normalize_gen_kwargs

        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        for name in sorted(given.keys() - _READ):
            log.warning(f"generation option {name} is not known and is left out")
        length = given["max_gen_toks"]
        if length >= self.max_length:
            raise DataError(
                f"answers of {length} tokens are asked for, and the model reads {self.max_length}; give "
                "--gen-kwargs max_gen_toks=N"
            )
        inputs = self.tok_encode(context)[-(self.max_length - length) :]
        end = self.model.tokenizer.id_to_token(self.eot_token_id)
        stop = tuple(dict.fromkeys([*filter(None, given["until"]), end]))
        how = {name: given[name] for name in _SAMPLING if name in given} if given["do_sample"] else {}
        return Prompt(tuple(inputs), stop, length, **how)

    def _complete(self, kind: str, asked: Sequence[Any], ask: Any) -> list[Any]:
        """Answers of requests, from the store where there is one."""
        if self.store is None:
            answers: dict[int, Any] = {}
            for numbers, some in ask(asked):
                answers |= zip(numbers, some, strict=True)
            return [answers[number] for number in range(len(asked))]

        def missing(numbers: list[int]) -> Any:
            for places, some in ask([asked[number] for number in numbers]):
                yield [numbers[place] for place in places], some

        return self.store.complete(kind, [list(vars(each).values()) for each in asked], missing)

    def get_model_info(self) -> dict[str, Any]:
        """Facts for the results."""
        decoder = self.model.model
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in decoder.parameters()),
            "model_dtype": self.model.config.training.precision,
        }
