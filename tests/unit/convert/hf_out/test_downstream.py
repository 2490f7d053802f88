"""What others decide by when they read an export, and the card's lines for vLLM.

``benchmarks/vllm_export.py`` runs vLLM; here are the facts of the files that its decisions rest on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_grit.config.schema import EmbeddingConfig, ModelConfig, RunConfig
from megatron_grit.convert.families import qwen
from megatron_grit.convert.hf_out.downstream import other_readers, vllm_paragraphs, vllm_settings
from megatron_grit.convert.hf_out.embedding import write_modules

POOLING_OF_VLLM = {
    "sentence_transformers.models.Pooling",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
}
"""Types of modules.json by which vLLM 0.32 takes a directory for a model that embeds and does not generate."""
DENSE_OF_VLLM = {"sentence_transformers.models.Dense", "sentence_transformers.base.modules.dense.Dense"}
"""Types that it applies after pooling."""


def modules(folder: Path, **embedding: Any) -> list[dict[str, Any]]:
    """modules.json of a model with a head of one layer."""
    config = RunConfig(embedding=EmbeddingConfig(projection_dim=8, **embedding))
    write_modules(folder, config, {}, {"embedding_head.weight": torch.zeros(8, config.model.hidden_size)})
    written: list[dict[str, Any]] = json.loads((folder / "modules.json").read_text())
    return written


@pytest.mark.parametrize("options", [{}, {"pooling": "lasttoken", "causal": True}, {"pooling": "max"}])
def test_by_its_modules_an_export_is_not_taken_for_an_embedder(options: dict[str, Any], tmp_path: Path) -> None:
    """vLLM would pool the whole prompt of a causal pass, as text-embeddings-inference does with a 1_Pooling."""
    types = [module["type"] for module in modules(tmp_path, **options)]
    assert not POOLING_OF_VLLM & set(types) and not (tmp_path / "1_Pooling").exists()
    assert DENSE_OF_VLLM & set(types)
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.util import import_from_string

    classes = {import_from_string(name).__name__ for name in types}
    assert classes == {"Transformer", "Pooling", "Dense", "Normalize"}


def test_older_readers_stop_where_they_would_embed_otherwise(tmp_path: Path) -> None:
    """sentence-transformers before 5.4 has no such module, transformers 4 no such argument of its models."""
    transformer = modules(tmp_path / "both")[0]["type"]
    assert transformer.startswith("sentence_transformers.base.")
    settings = json.loads((tmp_path / "both" / "sentence_bert_config.json").read_text())
    assert settings["config_args"] == {"is_causal": False}
    assert settings["model_args"] == {"experts_implementation": None}
    modules(tmp_path / "causal", causal=True)
    settings = json.loads((tmp_path / "causal" / "sentence_bert_config.json").read_text())
    assert settings["config_args"] == {} and "model_args" not in settings


def test_how_many_layers_come_before_the_first_window() -> None:
    """vLLM refuses a mixture of layers with a window and without only where this is below the number of layers."""
    windows: dict[str, tuple[int | None, list[int] | None, int]] = {
        "none": (None, None, 4),
        "every": (8, None, 0),
        "later": (8, [2, 3], 2),
        "others": (8, [1, 3], 1),
    }
    for name, (window, layers, leading) in windows.items():
        model = ModelConfig(num_layers=4, sliding_window=window, window_layers=layers, num_query_groups=2)
        for config in (qwen.qwen2_hf(model), qwen.qwen3_hf(model)):
            assert config["max_window_layers"] == leading, name


@pytest.mark.parametrize(
    ("embedding", "task"),
    [
        ({"pooling": "mean"}, "token_embed"),
        ({"pooling": "lasttoken"}, "embed"),
        ({"pooling": "cls", "projection_dim": 8}, "embed"),
        ({"pooling": "weightedmean_sgpt"}, None),
        ({"pooling": "mean", "projection_dim": 8, "linear_activation": "tanh"}, None),
    ],
)
def test_arguments_for_vllm(embedding: dict[str, Any], task: str | None) -> None:
    """Its pooler takes in the instruction, so averages are taken of the states; what it lacks is not offered."""
    config, overrides = RunConfig(embedding=EmbeddingConfig(**embedding)), {"is_causal": False}
    settings = vllm_settings(config, "LlamaForCausalLM", overrides)
    assert (None if settings is None else settings["pooler_config"]["task"]) == task
    if settings is not None:
        assert settings["runner"] == "pooling" and settings["hf_overrides"] == overrides
        assert vllm_settings(config, "MixtralForCausalLM", overrides) is None
        assert vllm_settings(config, "MixtralForCausalLM", {}) == settings | {"hf_overrides": {}}


def exported(architecture: str = "LlamaForCausalLM", **embedding: Any) -> Any:
    """As much of an export as the card's sections look at."""
    source = SimpleNamespace(config=RunConfig(embedding=EmbeddingConfig(**embedding)))
    return SimpleNamespace(source=source, family=SimpleNamespace(architecture=architecture), dtype=torch.bfloat16)


class FakeLLM:
    """An engine whose token k has the state (k, 1), with a token for each line and two for what comes last."""

    def __init__(self, path: str, **settings: Any) -> None:
        assert Path(path).is_dir() and settings["runner"] == "pooling"
        self.task = settings["pooler_config"].task

    def get_tokenizer(self) -> Any:
        return lambda text: SimpleNamespace(input_ids=["BOS", *text.split("\n")[:-1]])

    def encode(self, prompts: list[str], pooling_task: str) -> Any:
        assert self.task == pooling_task
        states = torch.tensor(
            [[float(place), 1.0] for place in range(len(self.get_tokenizer()(prompts[0]).input_ids) + 2)]
        )
        return [SimpleNamespace(outputs=SimpleNamespace(data=states))]

    def embed(self, prompts: list[str]) -> Any:
        assert self.task == "embed" and len(prompts) == 1
        return [SimpleNamespace(outputs=SimpleNamespace(embedding=[0.6, 0.8]))]


@pytest.mark.parametrize(
    ("embedding", "expected"),
    [
        ({"normalize": False}, [4.5, 1.0]),
        ({"normalize": True}, [4.5 / 21.25**0.5, 1 / 21.25**0.5]),
        ({"pooling": "max", "normalize": False}, [5.0, 1.0]),
        ({"pooling": "lasttoken"}, [0.6, 0.8]),
    ],
)
def test_the_cards_lines_for_vllm_stand_alone(
    embedding: dict[str, Any], expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing but PATH; ``vllm.config`` has to be imported. Of six states four are the prompt's."""
    package, config = ModuleType("vllm"), ModuleType("vllm.config")
    package.__dict__["LLM"], config.__dict__["PoolerConfig"] = FakeLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    model, overrides = exported(**embedding), {"is_causal": False}
    settings = vllm_settings(model.source.config, "LlamaForCausalLM", overrides)
    (tmp_path / "vllm_embed.json").write_text(json.dumps(settings))
    *_, lines = vllm_paragraphs(model, overrides, {}, "<|user|>\nFind\n<|embed|>\n")
    names: dict[str, Any] = {"PATH": str(tmp_path)}
    exec("\n".join(line[4:] for line in lines.splitlines()), names)
    assert torch.as_tensor(names["embedding"]).tolist() == pytest.approx(expected)


def test_the_card_says_what_others_do_with_this_model() -> None:
    """Windows in some layers, attention and pooling that vLLM lacks, and what is right anyhow."""
    overrides = {"is_causal": False}

    def vllm(model: Any, overrides: dict[str, Any], hf_config: dict[str, Any] | None = None) -> str:
        return "\n".join(vllm_paragraphs(model, overrides, hf_config or {}, ""))

    alone = '`runner="pooling"` alone takes the last state of causal attention'
    assert "generate and refuse to embed" in vllm(exported(), overrides) and alone in vllm(exported(), overrides)
    assert alone not in vllm(exported(pooling="lasttoken", causal=True), {})
    assert "attends causally whatever it is told" in vllm(exported("MixtralForCausalLM"), overrides)
    assert "has no pooling like" in vllm(exported("MixtralForCausalLM", pooling="weightedmean_sgpt"), overrides)
    mixed = {"layer_types": ["full_attention", "sliding_attention"]}
    assert "does not generate with this model" in vllm(exported("Qwen2ForCausalLM"), overrides, mixed)
    assert "Do not generate with vLLM" in vllm(exported("Qwen2MoeForCausalLM"), overrides, mixed)
    assert "text-embeddings-inference" in "\n".join(other_readers(exported(), overrides))
    assert "text-embeddings-inference" not in "\n".join(other_readers(exported(pooling="lasttoken", causal=True), {}))
