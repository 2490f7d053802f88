"""Each check lets the good configuration pass and stops the bad one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from megatron_grit.config.checks.run import check, find_problems, mesh_summary
from megatron_grit.config.parse import known_keys, parse_run_config, preset_names
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError, MeshError

DATA = ["--data.embedding=[e]", "--data.generative=[g]", "--data.tokenizer=t"]


def parse(*options: str, model: str = "tiny_mistral") -> RunConfig:
    return parse_run_config(["--model", model, *DATA, *(f"--{option}" for option in options)])


@pytest.mark.parametrize("model", preset_names())
def test_presets_pass(model: str) -> None:
    check(parse(model=model), 8, files=False)


@pytest.mark.parametrize(
    ("world_size", "options", "model"),
    [
        (2, ["parallel.tensor=2"], "tiny_mistral"),
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"], "tiny_mixtral"),
        (2, ["parallel.pipeline=2"], "tiny_mixtral"),
        (2, ["parallel.expert=2"], "tiny_mixtral"),
        (8, ["parallel.tensor=2", "parallel.pipeline=2"], "tiny_mistral"),
        (8, ["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2"], "tiny_mistral"),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.num_layers=4"], "tiny_mistral"),
        (2, ["parallel.context=2", "parallel.expert=2"], "tiny_mixtral"),
        (4, ["parallel.expert=2", "parallel.expert_tensor=2", "parallel.overlap=true"], "tiny_mixtral"),
        (4, ["data.num_rows_multiple=8"], "tiny_mistral"),
        (1, ["training.objective=generative", "data.embedding=[]"], "tiny_mistral"),
        (1, ["training.steps=0", "optimizer.warmup_steps=0"], "tiny_mistral"),
        (1, ["model.hidden_size=60", "model.num_attention_heads=4", "model.kv_channels=16"], "tiny_mistral"),
    ],
)
def test_possible_layouts_pass(world_size: int, options: list[str], model: str) -> None:
    check(parse(*options, model=model), world_size, files=False)


IMPOSSIBLE_MESHES = [
    (3, ["parallel.tensor=2"], "tiny_mistral", "the number of processes, 3, is no multiple of tensor 2"),
    (1, ["parallel.pipeline=2"], "tiny_mistral", "start a multiple of 2 processes"),
    (4, ["parallel.tensor=4"], "tiny_mistral", "parallel.tensor 4 does not divide model.num_query_groups 2"),
    (3, ["parallel.pipeline=3"], "tiny_mistral", "parallel.pipeline 3 does not divide model.num_layers 2"),
    (2, ["parallel.tensor=2", "model.ffn_hidden_size=129"], "tiny_mistral", "model.ffn_hidden_size 129"),
    (2, ["parallel.sequence_parallel=true"], "tiny_mistral", "needs parallel.tensor above 1"),
    (2, ["parallel.expert=2"], "tiny_mistral", "set model.num_experts"),
    (3, ["parallel.expert=3"], "tiny_mixtral", "does not divide model.num_experts 4"),
    (3, ["parallel.expert=2"], "tiny_mixtral", "does not divide the 3 processes of a pipeline stage"),
    (2, ["parallel.expert_tensor=2"], "tiny_mistral", "parallel.expert_tensor 2 needs a mixture"),
    (4, ["parallel.expert=2", "parallel.expert_tensor=4"], "tiny_mixtral", "parallel.expert_tensor 4 does not divide"),
    (2, ["parallel.virtual_pipeline=2"], "tiny_mistral", "needs parallel.pipeline above 1"),
    (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"], "tiny_mistral", "model.num_layers 2"),
    (
        8,
        ["parallel.pipeline=4", "parallel.virtual_pipeline=2", "model.num_layers=8"],
        "tiny_mistral",
        "set data.num_rows_multiple to 4",
    ),
    (2, ["parallel.tensor=2"], "tiny_mixtral", "needs parallel.sequence_parallel true"),
    (4, ["data.num_rows_multiple=6"], "tiny_mistral", "no multiple of the data parallel size 4"),
    (8, ["training.generative_batch_size=4"], "tiny_mistral", "below the 8 rows"),
    (8, ["training.embedding_batch_size=2"], "tiny_mistral", "gives 6 texts, fewer than the 8 rows"),
]


@pytest.mark.parametrize(("world_size", "options", "model", "message"), IMPOSSIBLE_MESHES)
def test_impossible_meshes(world_size: int, options: list[str], model: str, message: str) -> None:
    with pytest.raises(MeshError) as error:
        check(parse(*options, model=model), world_size, files=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


READS = ["model.retro.num_neighbors=2", "model.retro.layers=[1]"]
PREFERS = ["training.objective=preference", "preference.data=[p]"]
SAMPLES = ["training.objective=rollout", "rollout.data=[r]"]
CONTRADICTIONS = [
    (["parallel.context=2", "model.attention_backend=te"], "does not go with parallel.context above 1"),
    (["parallel.overlap=true", "training.objective=embedding"], "none for the language-model head"),
    (["model.hidden_size=66"], "does not divide model.hidden_size 66"),
    (["model.num_query_groups=3"], "does not divide model.num_attention_heads 4"),
    (["model.num_attention_heads=64", "model.num_query_groups=64"], "RoPE turns pairs of channels"),
    (["model.rotary_percent=0.3"], "RoPE turns pairs of channels"),
    (["model.num_experts=2", "model.moe_top_k=3"], "above model.num_experts 2"),
    (["model.attention_backend=te", "parallel.device=cpu"], "needs a GPU"),
    (["loss.grit_world_size=8"], "only with loss.emb_grad_scale grit"),
    (["loss.num_blocks=3", "training.embedding_batch_size=8"], "cannot be cut into 3 blocks of equal size"),
    (["training.embedding_batch_size=1", "data.train_group_size=1"], "leaves no negative for a query"),
    (["loss.num_blocks=8", "training.embedding_batch_size=8", "data.train_group_size=1"], "leaves no negative"),
    (["loss.num_blocks=2", "loss.negatives=hard"], "no effect with loss.negatives hard"),
    (["optimizer.min_lr=1"], "is above optimizer.lr"),
    (["training.steps=3", "optimizer.warmup_steps=4"], "is above training.steps 3"),
    (["data.embedding=[]"], "needs data.embedding"),
    (["data.generative=[]"], "needs data.generative"),
    (["data.embedding=[a, b, a]"], "names a more than once"),
    (["data.embedding=['0.5 a 0.5']"], "no prefix follows the weight 0.5"),
    (["data.generative=[nowhere.yaml]"], "nowhere.yaml: cannot read this blend file"),
    (["data.embedding_temperature=0"], "data.embedding_temperature must be above 0"),
    (["data.packing=window"], "data.packing window needs training.generative_rows"),
    (["data.packing=window", "training.generative_rows=3"], "generative_rows 3 is no multiple of 2"),
    (["training.generative_rows=4"], "has an effect only with data.packing window"),
    (["loss.microbatch_sequences=8"], "has an effect only with loss.loss_gen_type microbatch_mean or sum"),
    ([*PREFERS, "preference.loss=ipo", "preference.label_smoothing=0.1"], "label_smoothing has no effect on ipo"),
    ([*PREFERS, "preference.gamma_beta_ratio=2"], "gamma_beta_ratio has no effect on dpo"),
    ([*PREFERS, "preference.loss=ipo", "preference.desirable_weight=3"], ".desirable_weight has no effect on ipo"),
    ([*PREFERS, "preference.loss=orpo", "preference.undesirable_weight=0"], "undesirable_weight has no effect on orpo"),
    ([*PREFERS, "preference.loss=simpo", "preference.reference=adapters_off"], "no effect: simpo has no reference"),
    ([*PREFERS, "preference.reference_free=true", "preference.reference=adapters_off"], "reference_free leaves it out"),
    ([*SAMPLES, "rollout.completion_tokens=64"], "has an effect only with rollout.aggregation constant"),
    ([*SAMPLES, "rollout.reference=adapters_off"], "adapters_off has no effect without rollout.kl_weight"),
    (["data.tokenizer=null"], "data.tokenizer is not set"),
    (["training.valid_interval=5"], "training.valid_interval measures the loss on data.valid; give the texts"),
    (["training.skip_train=true"], "training.skip_train measures the loss on data.valid; give the texts"),
    (["data.valid=[v]", "training.objective=embedding"], "which training.objective embedding does not train"),
    (["data.valid=[v, ./g]"], "./g is trained on as well"),
    (["data.valid=['0.5 v 0.5 w']"], "v has a weight, epochs or a cap"),
    (["data.valid=[nowhere.yaml]"], "nowhere.yaml: cannot read this blend file"),
    (["data.retro_shuffle=true"], "data.retro_shuffle has no effect: no neighbors are read"),
    (["model.retro.num_neighbors=2", "model.num_layers=4"], "no layer reads"),
    (
        ["model.retro.num_neighbors=2", "model.retro.layers=[40]"],
        "model.retro.layers has layer 40, but layers are 0 to",
    ),
    (["model.retro.num_neighbors=2", "model.retro.layers=[1,1]"], "names a layer twice"),
    (
        [*READS, "model.parallel_residual=two_norms"],
        "parallel_residual does not go with",
    ),
    (
        [*READS, "model.retro.parity=core", "parallel.context=2"],
        "is for comparisons, with parallel.pipeline and parallel.context 1",
    ),
    (
        [
            *READS,
            "model.position_embedding=learned_absolute",
            "model.max_position_embeddings=100",
        ],
        "a neighbor has 128 tokens",
    ),
    (
        [
            *READS,
            "model.retro.parity=core",
            "parallel.tensor=2",
            "parallel.sequence_parallel=true",
        ],
        "model.retro.parity core is for comparisons",
    ),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS)
def test_contradictions(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(parse(*options), 2, files=False)
    assert message in str(error.value)


def numeric_keys() -> list[str]:
    return [key for key, hint in known_keys().items() if hint in (int, float, int | None, float | None)]


def facts(key: str) -> dict[str, float]:
    """Metadata of a key's field."""
    *sections, name = key.split(".")
    section = functools.reduce(getattr, sections, RunConfig())
    return dict(type(section).__dataclass_fields__[name].metadata)


@pytest.mark.parametrize("key", numeric_keys())
def test_every_number_has_a_smallest_value(key: str) -> None:
    assert len({"at_least", "above"} & facts(key).keys()) == 1


def with_value(key: str, value: float) -> RunConfig:
    config = parse()
    *sections, name = key.split(".")
    setattr(functools.reduce(getattr, sections, config), name, value)
    return config


@pytest.mark.parametrize("key", numeric_keys())
def test_numbers_below_their_range_and_not_numbers(key: str) -> None:
    bounds = facts(key)
    bad = [float("nan"), float("inf")]
    bad += [bounds[name] for name in ("above", "below") if name in bounds]
    bad += [bounds["at_least"] - 1] if "at_least" in bounds else []
    bad += [bounds["at_most"] + 1] if "at_most" in bounds else []
    for value in bad:
        with pytest.raises(ConfigError, match=f"{key} must be"):
            check(with_value(key, value), 1, files=False)


def test_the_message_says_where_the_key_is() -> None:
    with pytest.raises(ConfigError, match="^run.yaml:7: training.steps must be at least 0, not -1$"):
        check(parse("training.steps=-1"), 1, files=False, origins={"training.steps": "run.yaml:7"})


def test_files(tmp_path: Path) -> None:
    prefixes = {kind: str(tmp_path / kind) for kind in ("embedding", "generative")}
    tokenizer, load, output = tmp_path / "tokenizer", tmp_path / "checkpoint", tmp_path / "output"
    config = parse(
        *(f"data.{kind}=[{prefix}]" for kind, prefix in prefixes.items()),
        f"data.tokenizer={tokenizer}",
        f"checkpoint.load={load}",
        f"output_dir={output}",
    )
    for suffix in (".idx", ".bin", ".json"):
        expected = [f"no file {prefix}{suffix}" for prefix in prefixes.values()]
        expected += [f"no file {tokenizer}", f"no directory {load}"]
        problems = list(find_problems(config, 1))
        assert len(problems) == len(expected)
        assert all(text in problem.message for text, problem in zip(expected, problems, strict=True))
        for prefix in prefixes.values():
            Path(prefix + suffix).touch()
    tokenizer.mkdir()
    load.mkdir()
    assert [problem.key for problem in find_problems(config, 1)] == ["data.tokenizer"]
    (tokenizer / "tokenizer.model").touch()
    assert list(find_problems(config, 1)) == []
    output.touch()
    assert [problem.key for problem in find_problems(config, 1)] == ["output_dir"]
    (tmp_path / "generative.bin").unlink()
    (problem, _) = find_problems(config, 1)
    assert problem.key == "data.generative" and "generative.bin" in problem.message
    assert not any("generative" in p.key for p in find_problems(parse("training.objective=embedding"), 1))


def test_mesh_summary() -> None:
    assert mesh_summary(parse("parallel.expert=2", model="tiny_mixtral"), 2) == (
        "2 processes = tensor 1 x pipeline 1 x data 2 (expert 2)"
    )
    assert mesh_summary(parse("parallel.tensor=2", "parallel.pipeline=2"), 8) == (
        "8 processes = tensor 2 x pipeline 2 x data 2"
    )
    assert mesh_summary(parse(), 1).startswith("1 process = ")
