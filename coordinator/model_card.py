"""README.md of an exported model: what it is, who took part, how good it is on what, and what it must not be used for.

The front matter follows the Hugging Face Hub's model cards. A JSON string is a YAML string, so no library is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from protos.jobspec import Classification, JobSpec, Lora
from protos.v1 import operator_pb2

HERE = "path/to/this/folder"


def card(model: operator_pb2.GetModelResponse, *, spec: JobSpec, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole text; `files` has size and digest of each file beside it."""
    assert isinstance(spec.task, Classification) and spec.base_model is not None
    parts = [
        _front_matter(spec),
        f"# {spec.name}, version {model.version}",
        f"Sorts a text into one of {len(spec.task.labels)} labels. Fine-tuned by federated learning: the sites below "
        "trained on their own data, and only numbers left them.",
        _facts(model, spec),
        "## Use",
        f"```python\n{usage(spec, directory=HERE)}\n```",
        *([f"`{spec.base_model.name}` stands for the base model's own directory."] if _is_adapter(spec) else []),
        "Labels: " + ", ".join(f"`{label}`" for label in spec.task.labels) + f". At most {spec.task.max_length} tokens "
        "of a text were seen in training and evaluation; give `max_length` as above for the same results.",
        "## Who took part",
        _contributors(model),
        "## Evaluation",
        _evaluation(model, spec),
        "## Limits",
        "- Not a medical device. It has not been reviewed for clinical use; do not decide about a patient with it.\n"
        "- The figures above hold for data like the rows they were measured on. Another hospital writes differently: "
        "measure there first.\n"
        "- A label that a site hardly has is learnt from the others, and may fit that site badly.\n"
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


def usage(spec: JobSpec, *, directory: str) -> str:
    """The lines of Python that use the model; for an adapter they need the base model beside it."""
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


def _is_adapter(spec: JobSpec) -> bool:
    return isinstance(spec.method, Lora)


def _front_matter(spec: JobSpec) -> str:
    assert spec.base_model is not None
    library = "peft" if _is_adapter(spec) else "transformers"
    return "\n".join(
        (
            "---",
            f"library_name: {library}",
            "pipeline_tag: text-classification",
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
        method = f"LoRA, rank {spec.method.rank}, alpha {spec.method.alpha:g}, on {targets}; and the task's head"
    else:
        method = "all weights" + (", embeddings frozen" if spec.method.freeze_embeddings else "")
    layers = f", its first {spec.base_model.layers} layers" if spec.base_model.layers else ""
    rows = [
        ("base model", f"{spec.base_model.name}{layers}; digest `{model.base_digest}`"),
        ("what was trained", method),
        ("round", f"{model.version} of {spec.rounds}"),
        ("aggregation", f"weighted mean by {spec.aggregation.weights}"),
        ("server optimizer", spec.aggregation.server_optimizer.type),
        ("job", f"`{model.job_id}`, recipe `{spec.hash}`"),
        ("version", f"{model.version}, digest `{model.model.digest}`"),
    ]
    return _table(("", ""), rows)


def _contributors(model: operator_pb2.GetModelResponse) -> str:
    if not model.contributors:
        return "Nobody yet: version 0 is the base model with a fresh head."
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
    names = sorted({name for view in found for name in view.metrics})
    rows = [
        (view.split, view.site, str(view.examples), *(_number(view.metrics.get(name)) for name in names))
        for view in found
    ]
    return (
        f"The best round is chosen by {spec.evaluation.metric} on validation data; test data has no part in it.\n\n"
        + _table(("split", "at", "rows", *names), sorted(rows))
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
