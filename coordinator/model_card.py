"""README.md of an exported model: what it is, who took part, how good it is on what, and what it must not be used for.

The front matter follows the Hugging Face Hub's model cards. A JSON string is a YAML string, so no library is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator import benchmarks
from protos.jobspec import CausalLm, Classification, JobSpec, Lora, Synthetic
from protos.metrics import BENCHMARK_METRICS
from protos.recipe_tasks import PromptTemplate
from protos.v1 import operator_pb2

HERE = "path/to/this/folder"
# The last is by which option is likeliest, whatever the model would write.
ASKED = (
    "split",
    "at",
    "benchmark",
    "questions",
    "% right",
    "% no option",
    "% right of the others",
    "% likeliest right",
)


def card(model: operator_pb2.GetModelResponse, *, spec: JobSpec, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole text; `files` has size and digest of each file beside it."""
    assert not isinstance(spec.task, Synthetic) and spec.base_model is not None
    parts = [
        _front_matter(spec),
        f"# {spec.name}, version {model.version}",
        f"{_purpose(spec.task)} Fine-tuned by federated learning: the sites below trained on their own data, and only "
        "numbers left them.",
        _facts(model, spec),
        "## Use",
        f"```python\n{usage(spec, directory=HERE)}\n```",
        *([f"`{spec.base_model.name}` stands for the base model's own directory."] if _is_adapter(spec) else []),
        _hint(spec.task),
        "## Who took part",
        _contributors(model),
        "## Evaluation",
        _evaluation(model, spec),
        "## Limits",
        "- Not a medical device. It has not been reviewed for clinical use; do not decide about a patient with it.\n"
        "- The figures above hold for data like the rows they were measured on. Another hospital writes differently: "
        "measure there first.\n"
        f"- {_weakness(spec.task)}\n"
        "- Trained weights can hold traces of the training texts. Agree with the sites before you publish them.",
        "## Files",
        _table(
            ("file", "bytes", "BLAKE3"),
            [(name, str(file["size"]), f"`{file['digest']}`") for name, file in files.items()],
        ),
        "## Recipe",
        f"```json\n{json.dumps(spec.model_dump(mode='json'), indent=1, ensure_ascii=False)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _purpose(task: Classification | CausalLm) -> str:
    if isinstance(task, CausalLm):
        return "Answers instructions."
    return f"Sorts a text into one of {len(task.labels)} labels."


def _hint(task: Classification | CausalLm) -> str:
    if isinstance(task, CausalLm):
        form = "the recipe's own" if isinstance(task.template, PromptTemplate) else f"`{task.template}`"
        return (
            f"It was trained on prompts in one form, {form} (see template in the recipe below), with answers to match: "
            f"{task.max_length} tokens in all. Other prompts are answered worse."
        )
    return (
        "Labels: " + ", ".join(f"`{label}`" for label in task.labels) + f". At most {task.max_length} tokens of a text "
        "were seen in training and evaluation; give `max_length` as above for the same results."
    )


def _weakness(task: Classification | CausalLm) -> str:
    if isinstance(task, CausalLm):
        return "What it does not know it makes up, as fluently as the rest."
    return "A label that a site hardly has is learnt from the others, and may fit that site badly."


def usage(spec: JobSpec, *, directory: str) -> str:
    """The lines of Python that use the model; for an adapter they need the base model beside it."""
    if isinstance(spec.task, CausalLm):
        return _usage_of_a_language_model(spec, directory=directory)
    if not isinstance(spec.task, Classification):
        return f'from safetensors import safe_open\nprint(safe_open("{directory}/model.safetensors", "numpy").keys())'
    call = f'print(classify("A text.", truncation=True, max_length={spec.task.max_length}))'
    if not _is_adapter(spec):
        return (
            "from transformers import pipeline\n"
            f'classify = pipeline("text-classification", model="{directory}")\n'
            f"{call}"
        )
    assert spec.base_model is not None
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline\n"
        f'config, tokenizer = AutoConfig.from_pretrained("{directory}"), AutoTokenizer.from_pretrained("{directory}")\n'
        f'base = AutoModelForSequenceClassification.from_pretrained("{spec.base_model.name}", config=config)\n'
        f'model = PeftModel.from_pretrained(base, "{directory}").merge_and_unload()\n'
        'classify = pipeline("text-classification", model=model, tokenizer=tokenizer)\n'
        f"{call}"
    )


def _usage_of_a_language_model(spec: JobSpec, *, directory: str) -> str:
    call = 'print(answer("A prompt.", return_full_text=False, max_new_tokens=256))'
    if not _is_adapter(spec):
        return f'from transformers import pipeline\nanswer = pipeline("text-generation", model="{directory}")\n{call}'
    assert spec.base_model is not None
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline\n"
        f'base = AutoModelForCausalLM.from_pretrained("{spec.base_model.name}")\n'
        f'model = PeftModel.from_pretrained(base, "{directory}").merge_and_unload()\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{directory}")\n'
        'answer = pipeline("text-generation", model=model, tokenizer=tokenizer)\n'
        f"{call}"
    )


def _is_adapter(spec: JobSpec) -> bool:
    return isinstance(spec.method, Lora)


def _front_matter(spec: JobSpec) -> str:
    assert spec.base_model is not None
    library = "peft" if _is_adapter(spec) else "transformers"
    return "\n".join(
        (
            "---",
            f"library_name: {library}",
            f"pipeline_tag: {'text-generation' if isinstance(spec.task, CausalLm) else 'text-classification'}",
            f"base_model: {json.dumps(spec.base_model.name)}",
            "tags:",
            "- federated-learning",
            "- silotune",
            "---",
        )
    )


def _facts(model: operator_pb2.GetModelResponse, spec: JobSpec) -> str:
    assert spec.base_model is not None
    if isinstance(spec.method, Lora):
        targets = ", ".join(spec.method.targets)
        method = f"LoRA, rank {spec.method.rank}, alpha {spec.method.alpha:g}, on {targets}" + (
            "; and the task's head" if isinstance(spec.task, Classification) else ""
        )
    else:
        method = "all weights" + (", embeddings frozen" if spec.method.freeze_embeddings else "")
    layers = f", its first {spec.base_model.layers} layers" if spec.base_model.layers else ""
    if spec.base_model.quantization != "none":
        layers += f", in {spec.base_model.quantization}"
    rows = [
        ("base model", f"{spec.base_model.name}{layers}; digest `{model.base_digest}`"),
        ("what was trained", method),
        ("round", f"{model.version} of {spec.rounds}"),
        ("aggregation", f"{spec.aggregation.rule}, weighted by {spec.aggregation.weights}"),
        ("server optimizer", spec.aggregation.server_optimizer.type),
        ("job", f"`{model.job_id}`, recipe `{spec.hash}`"),
        ("version", f"{model.version}, digest `{model.model.digest}`"),
    ]
    return _table(("", ""), rows)


def _contributors(model: operator_pb2.GetModelResponse) -> str:
    if not model.contributors:
        return "Nobody yet: nothing in version 0 was trained but the base model."
    total = sum(update.examples for update in model.contributors)
    rows = [(update.site, str(update.examples), str(update.steps)) for update in model.contributors]
    return (
        f"In round {model.version}, {len(rows)} sites with {total} rows. Earlier rounds may have had others.\n\n"
        + _table(("site", "rows", "steps"), rows)
    )


def _evaluation(model: operator_pb2.GetModelResponse, spec: JobSpec) -> str:
    found = [view for view in model.evaluations if view.version == model.version]
    if not found:
        return "This version was not evaluated."
    names = sorted({name for view in found for name in view.metrics} - BENCHMARK_METRICS)
    rows = [
        (view.split, view.site, str(view.examples), *(_number(view.metrics.get(name)) for name in names))
        for view in found
    ]
    parts = [
        f"The best round is chosen by {spec.evaluation.metric} on validation data; test data has no part in it.",
        _table(("split", "at", "rows", *names), sorted(rows)),
    ]
    asked = [
        (view, name) for view in found for name in spec.evaluation.benchmarks if f"{name}_questions" in view.metrics
    ]
    if asked:
        parts.append(_table(ASKED, sorted(_answers(view, benchmark=name) for view, name in asked)))
    # Of all who asked together: who has the questions is most often the house agent alone.
    parts += benchmarks.lines(model.evaluations, evaluation=spec.evaluation, version=model.version, house=())
    return "\n\n".join(parts)


def _answers(view: operator_pb2.EvaluationView, *, benchmark: str) -> tuple[str, ...]:
    def percent(measure: str) -> str:
        value = view.metrics.get(f"{benchmark}_{measure}")
        return "" if value is None else f"{100 * value:.2f}"

    shares = [percent(name) for name in ("accuracy", "unparseable", "parseable_accuracy", "option_accuracy")]
    return (view.split, view.site, benchmark, f"{view.metrics[f'{benchmark}_questions']:.0f}", *shares)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
