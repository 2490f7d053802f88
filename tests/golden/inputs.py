"""Inputs of the goldens, made from a fixed seed without any code of the package: texts, records, tables and models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

_SYLLABLES = "ka to mi re su no la vi pe du zo fi".split()
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_inputs(folder: Path) -> None:
    """Write all inputs into an empty folder."""
    draw = random.Random(20261129)
    words = sorted({"".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(400)})
    _write_documents(folder, draw, words)
    _write_records(folder, draw, words)
    _write_tables(folder, draw, words)
    write_model(folder / "mistral", seed=0)
    write_model(folder / "mistral_tuned", seed=0, change=1e-3)
    write_encoder(folder / "encoder", words)


def _sentence(draw: random.Random, words: list[str]) -> str:
    return " ".join(draw.choices(words, k=draw.randint(3, 14))).capitalize() + draw.choice([".", ".", "?", "!"])


def _text(draw: random.Random, words: list[str], longest: int) -> str:
    return " ".join(_sentence(draw, words) for _ in range(draw.randint(1, longest)))


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _write_documents(folder: Path, draw: random.Random, words: list[str]) -> None:
    texts = [_text(draw, words, 9) for _ in range(60)]
    texts += [*texts[:4], " ".join([texts[5], texts[6]]), "", "Größe – naïve “quotes”, 漢字 and 🙂. \n Dr. Who left.\n"]
    documents: list[dict[str, Any]] = [{"text": text, "title": text[:20] or "none"} for text in texts]
    _write_jsonl(folder / "documents.jsonl", documents)
    _write_jsonl(folder / "more.jsonl", [{"text": _text(draw, words, 9)} for _ in range(12)] + documents[:2])


def _write_records(folder: Path, draw: random.Random, words: list[str]) -> None:
    pairs: list[dict[str, Any]] = []
    for number in range(48):
        query, positives = _sentence(draw, words), [_text(draw, words, 3) for _ in range(1 + number % 2)]
        negatives = [_text(draw, words, 3) for _ in range(2)]
        if number % 3:
            told = [["Find the answer" if number % 2 else "", query], [["", text] for text in positives]]
            pairs.append({"query": told[0], "pos": told[1], "neg": [["", text] for text in negatives], "id": number})
        else:
            pairs.append({"query": query, "pos": positives, "neg": negatives})
    pairs += [{"query": "", "pos": ["empty"], "neg": ["query"]}, {"query": ["i " * 900, "q"], "pos": [["", "p"]]}]
    _write_jsonl(folder / "pairs.jsonl", pairs)
    chats: list[dict[str, Any]] = []
    for number in range(40):
        turns = [_text(draw, words, 2) for _ in range(2 * draw.randint(1, 3))]
        roles = ["user", "assistant"] * (len(turns) // 2)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        if number % 4 == 0:
            chats.append({"messages": [{"role": "system", "content": "Be brief."}, *messages]})
        elif number % 4 == 1:
            chats.append({"text": turns})
        elif number % 4 == 2:
            chats.append({"prompt": turns[0], "completion": turns[1]})
        else:
            chats.append({"text": turns[0]})
    _write_jsonl(folder / "chats.jsonl", [*chats, {"text": ["a question", ""]}])


def _write_tables(folder: Path, draw: random.Random, words: list[str]) -> None:
    rows = ["split\tdataset\tfilename\tsentence1\tsentence2\tlabel"]
    for _ in range(20):
        premise = _sentence(draw, words)
        for label in ("entailment", "contradiction", "neutral"):
            rows.append("\t".join(["train", "SNLI", "f", premise, _sentence(draw, words), label]))
    (folder / "nli.tsv").write_text("\n".join(rows) + "\n")
    queries, corpus, negatives = [], [], []
    for number in range(20):
        queries.append(f"{number}\t{_sentence(draw, words)}\n")
        corpus.append(f"{number}\t{_text(draw, words, 2)}\n")
        mined = [{"pid": (number + step) % 20, "ce-score": 8.0 - 2 * step} for step in range(1, 7)]
        positives = [{"pid": number, "ce-score": 8.0}]
        negatives.append({"qid": number, "pos": positives, "neg": {"bm25": mined, "dense": mined[::-1]}})
    (folder / "queries.tsv").write_text("".join(queries))
    (folder / "corpus.tsv").write_text("".join(corpus))
    _write_jsonl(folder / "negatives.jsonl", negatives)


def write_model(folder: Path, *, seed: int, change: float = 0.0) -> None:
    """A tiny Mistral in Hugging Face's files; with ``change``, its weights moved by that much."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    random_, moved = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    width, ffn, vocab = SHAPE["hidden_size"], SHAPE["intermediate_size"], 512
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}self_attn.k_proj.weight": (width // 2, width),
            f"{prefix}self_attn.v_proj.weight": (width // 2, width),
            f"{prefix}self_attn.o_proj.weight": (width, width),
            f"{prefix}post_attention_layernorm.weight": (width,),
            f"{prefix}mlp.gate_proj.weight": (ffn, width),
            f"{prefix}mlp.up_proj.weight": (ffn, width),
            f"{prefix}mlp.down_proj.weight": (width, ffn),
        }
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    tensors = {}
    for name, shape in shapes.items():
        value = random_.standard_normal(shape) * 0.1 + change * moved.standard_normal(shape)
        tensors[name] = torch.from_numpy((value + (1 if "norm" in name else 0)).astype(np.float32)).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = SHAPE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
    config |= {"head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    config |= {"rope_theta": 10000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": vocab}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", "use_cache": True}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_encoder(folder: Path, words: list[str]) -> None:
    """A BERT of one layer and its WordPiece tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "!", ",", *words]
    width, ffn = 16, 32
    dense = {"attention.self.query": (width, width), "attention.self.key": (width, width)}
    dense |= {"attention.self.value": (width, width), "attention.output.dense": (width, width)}
    dense |= {"intermediate.dense": (ffn, width), "output.dense": (width, ffn)}
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(vocabulary), width),
        "embeddings.position_embeddings.weight": (128, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    norms = ["embeddings.LayerNorm", "encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.output.LayerNorm"]
    for name, shape in dense.items():
        shapes |= {f"encoder.layer.0.{name}.weight": shape, f"encoder.layer.0.{name}.bias": shape[:1]}
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    random_ = np.random.default_rng(7)
    tensors = {
        name: torch.from_numpy(random_.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": width, "intermediate_size": ffn}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(vocabulary), "pad_token_id": 0}
    config |= {"max_position_embeddings": 128, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(_word_piece(vocabulary), ensure_ascii=False))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = special | {"mask_token": "[MASK]", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _word_piece(vocabulary: list[str]) -> dict[str, Any]:
    numbers = {word: number for number, word in enumerate(vocabulary)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ends = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": numbers[name], "content": name} | flags for name in vocabulary[:5]],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], text, ends[1]],
            "pair": [ends[0], text, ends[1], {"Sequence": {"id": "B", "type_id": 0}}, ends[1]],
            "special_tokens": {
                name: {"id": name, "ids": [numbers[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": numbers,
        },
    }
