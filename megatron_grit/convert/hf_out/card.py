"""The model card of an export: what the model is and how to use it. Unknown facts are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_grit import __version__
from megatron_grit.config.embedding_shape import head_widths
from megatron_grit.config.kinds import kind_names, kind_options, kind_sources, trained_kinds
from megatron_grit.convert.hf_out.downstream import other_readers, vllm_paragraphs
from megatron_grit.convert.hf_out.exported import Exported
from megatron_grit.data.text.templates import EMBED_PREFIX, USER_PREFIX, embedding_prefix

_POOLING = {
    "mean": "the mean of the text's states",
    "weightedmean": "the mean of the text's states with weights 1, 2, 3 ... over the text",
    "weightedmean_sgpt": "the mean of the text's states, each weighted by its position, instruction counted",
    "learnedmean": "the mean of the text's states with a trained weight for each position",
    "max": "the maximum of the text's states in each channel",
    "cls": "the first state",
    "lasttoken": "the last state",
}
_EXAMPLE_PROMPT = embedding_prefix("Find the passage that answers the question")


def model_card(
    exported: Exported, hf_config: dict[str, Any], overrides: dict[str, Any], missing: str | None, remarks: list[str]
) -> str:
    """README.md.

    Args:
        exported: the model.
        hf_config: config.json.
        overrides: keys of config.json that have other values for embedding.
        missing: why sentence-transformers cannot embed with the model. None: it can.
        remarks: sentences about the tokenizer.
    """
    parts = [
        _front_matter(exported, missing is None),
        f"# {_title(exported)}",
        _introduction(exported),
        *_embed(exported, overrides, missing),
        *_generate(exported),
        *([] if missing else vllm_paragraphs(exported, overrides, hf_config, _EXAMPLE_PROMPT)),
        *([] if missing else other_readers(exported, overrides)),
        *_training(exported),
        "\n".join(f"- {remark}" for remark in remarks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(exported: Exported) -> str:
    return exported.source.run.name if exported.source.path.parent.name == "checkpoints" else exported.source.path.name


def _front_matter(exported: Exported, embeds: bool) -> str:
    lines = ["library_name: sentence-transformers" if embeds else "library_name: transformers"]
    lines.append("pipeline_tag: sentence-similarity" if embeds else "pipeline_tag: text-generation")
    lines += ["tags:", "- feature-extraction", "- text-generation"]
    base = exported.source.model.pretrained
    if base is not None and _is_on_hub(base):
        lines.append(f"base_model: {base.partition('@')[0]}")
    return "\n".join(["---", *lines, "---"])


def _is_on_hub(base: str) -> bool:
    """Whether it reads as organisation/name, and no such directory is here."""
    return base.count("/") == 1 and not base.startswith((".", "~", "/")) and not Path(base.partition("@")[0]).exists()


def _introduction(exported: Exported) -> str:
    model, embedding = exported.source.model, exported.source.config.embedding
    experts = "" if model.num_experts is None else f", {model.num_experts} experts, {model.moe_top_k} a token"
    shape = (
        f"A {exported.family.name} model of {exported.num_parameters:,} parameters ({model.num_layers} layers, width "
        f"{model.hidden_size}, {model.vocab_size} tokens{experts}), in {_dtype_name(exported)}."
    )
    attention = "causal" if embedding.causal else "bidirectional"
    size = ([model.hidden_size, *head_widths(exported.source.config)])[-1]
    return (
        f"{shape} It generates with causal attention and embeds with {attention} attention. An embedding has {size} "
        f"channels: {_POOLING[embedding.pooling]}{', normalised to length 1' if embedding.normalize else ''}."
    )


def _dtype_name(exported: Exported) -> str:
    return str(exported.dtype).removeprefix("torch.")


def _embed(exported: Exported, overrides: dict[str, Any], missing: str | None) -> list[str]:
    template = f"{USER_PREFIX}{{instruction}}{EMBED_PREFIX}"
    text = (
        "A text to embed is written as\n\n"
        f"    {_shown(template)}{{text}}\n\n"
        "after the BOS token, which the tokenizer adds; without an instruction as\n\n"
        f"    {_shown(embedding_prefix(''))}{{text}}\n\n"
        "White space and colons around an instruction are not part of it. The instruction and the template are "
        "attended and not pooled."
    )
    if missing is not None:
        return ["## Embed", text, f"sentence-transformers cannot do this: {missing}. Use megatron_grit to embed."]
    code = [
        "    from sentence_transformers import SentenceTransformer",
        "",
        "    model = SentenceTransformer(PATH)",
        f"    prompt = {_EXAMPLE_PROMPT!r}",
        '    queries = model.encode(["which function parses JSON?"], prompt=prompt)',
        '    passages = model.encode(["json.loads reads a string."])',
        "    print(model.similarity(queries, passages))",
    ]
    notes = [
        "It needs sentence-transformers 5.4 or newer. Older ones cannot import the modules; they would pool a token of "
        "the prompt."
    ]
    if overrides:
        keys = " and ".join(f"`{key}`" for key in overrides)
        notes.append(
            f"sentence_bert_config.json sets {keys} for embedding, which needs transformers 5.2 or newer. transformers "
            "4 stops at `experts_implementation`, which is there for that; 5.0 and 5.1 do not look at `is_causal` and "
            "embed causally, without a word. config.json stays that of the causal decoder. Without "
            "sentence-transformers, give these keys to AutoConfig.from_pretrained."
        )
    notes.append(
        f"Texts above {exported.source.model.max_position_embeddings} tokens are cut; set model.max_seq_length."
    )
    return ["## Embed", text, "\n".join(code), " ".join(notes)]


def _shown(text: str) -> str:
    return text.replace("\n", "\\n")


def _generate(exported: Exported) -> list[str]:
    only_embeds = all(kind_options(kind).EMBEDS for kind in trained_kinds(exported.source.config))
    if only_embeds and exported.source.state.get("step"):
        return []
    code = [
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "    tokenizer = AutoTokenizer.from_pretrained(PATH)",
        "    model = AutoModelForCausalLM.from_pretrained(PATH)",
        '    messages = [{"role": "user", "content": "What does json.dumps do?"}]',
        '    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)",
        "    answer = model.generate(**prompt, max_new_tokens=128)",
        '    print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]
    return ["## Generate", "\n".join(code)]


def _training(exported: Exported) -> list[str]:
    """Facts from the run's files; a model that was converted and never trained has none."""
    source = exported.source
    state, config = source.state, source.config
    objective = config.training.objective
    versions = {"megatron_grit": __version__} | state.get("versions", {})
    rows = []
    base = config.model.pretrained or config.checkpoint.load
    if base is not None:  # of a path on some machine only the last part says anything
        rows.append(("started from", base if _is_on_hub(base) else Path(base).name))
    if state.get("step"):
        mesh = [f"{name} {size}" for name, size in state.get("parallel", {}).items()]
        rows += [
            ("objective", objective if isinstance(objective, str) else ", ".join(objective)),
            ("steps", f"{state['step']}"),
            ("mesh", f"{', '.join(mesh)}; processes {state.get('world_size')}"),
            ("precision", config.training.precision),
            ("seed", str(state.get("seed"))),
        ]
        rows += [(f"last {name}", f"{value:.4f}") for name, value in _losses(exported).items()]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return ["## Training" if state.get("step") else "## Origin", "\n".join(table), _data(exported)]


def _losses(exported: Exported) -> dict[str, float]:
    """Losses of the checkpoint's step, or of the last line before it."""
    step, found = exported.source.state["step"], {}
    metrics = [kind_options(kind).METRICS for kind in kind_names()]
    wanted = [
        "loss",
        *(names[0] for names in metrics),
        "loss_balance",
        *(name for names in metrics for name in names[1:]),
    ]
    try:
        lines = (exported.source.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines:
            record = json.loads(line)
            if record["step"] <= step:
                found = {name: record[name] for name in wanted if isinstance(record.get(name), float)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def _data(exported: Exported) -> str:
    config = exported.source.config
    if not exported.source.state.get("step"):
        return ""
    try:
        counts = json.loads((exported.source.run / "blend_counts.json").read_bytes())
        rows = [
            f"| {kind} | {Path(name).name} | {count} |"
            for kind, sources in counts.items()
            for name, count in sources.items()
        ]
        return "\n".join(["| kind | source | samples |", "| --- | --- | --- |", *rows])
    except (OSError, ValueError, AttributeError):
        rows = [
            f"- {kind}: {' '.join(Path(word).name for word in item.split())}"
            for kind in kind_names()
            for item in kind_sources(config, kind)
        ]
        return "\n".join(rows)
