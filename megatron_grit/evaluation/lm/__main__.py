"""lm-eval's own command, with our models among its models: ``python -m megatron_grit.evaluation.lm run --model
megatron-grit --model_args checkpoint=FOLDER --tasks ...``."""

from __future__ import annotations

from megatron_grit.evaluation.lm.harness import import_lm_eval
from megatron_grit.parallel.failures import guarded


def _run() -> None:
    import_lm_eval(allow_downloads=True)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "megatron-grit" not in model_registry:
        model_registry.register("megatron-grit", target="megatron_grit.evaluation.lm.adapter:MegatronGritLM")
    cli_evaluate()


if __name__ == "__main__":
    raise SystemExit(guarded(_run, "lm_eval", joins_job=True))
