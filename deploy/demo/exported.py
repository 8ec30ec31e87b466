"""The exported model in a process of its own that has nothing but the Hugging Face libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from client_agent.training.data import Rows
from deploy.local import CommandFailed

LIMIT_SECONDS = 300.0
# Isolated (-I), so that not even this project's folder is on its path.
_SCRIPT = """
import json, sys
from transformers import pipeline
asked = json.load(sys.stdin)
classify = pipeline("text-classification", model=asked["model"])
answers = classify(asked["texts"], truncation=True, max_length=asked["max_length"], batch_size=32)
print(json.dumps([answer["label"] for answer in answers]))
"""


def classify(model: Path, texts: Sequence[str], *, max_length: int) -> list[str]:
    """The model's label for each text. CommandFailed when it cannot be loaded or used."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _SCRIPT],
        input=json.dumps({"model": str(model.resolve()), "texts": list(texts), "max_length": max_length}),
        capture_output=True, text=True, timeout=LIMIT_SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    if done.returncode:
        raise CommandFailed([sys.executable, "-I", "-c", "..."], done.returncode, done.stderr)
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def recall_by_label(rows: Rows, answers: Sequence[str]) -> dict[str, float]:
    """Which part of each label's rows was recognised; labels without a row are left out."""
    hits: dict[str, list[bool]] = {}
    for label, answer in zip(rows.labels, answers, strict=True):
        name = rows.label_names[label]
        hits.setdefault(name, []).append(answer == name)
    return {name: sum(hits[name]) / len(hits[name]) for name in rows.label_names if name in hits}


def accuracy(rows: Rows, answers: Sequence[str]) -> float:
    pairs = zip(rows.labels, answers, strict=True)
    return sum(rows.label_names[label] == answer for label, answer in pairs) / len(rows)
