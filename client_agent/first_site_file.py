"""The site.toml that enrollment writes: every choice is explained, and nothing is allowed until somebody says so."""

from __future__ import annotations

from pathlib import Path

TEXT = """\
# What this site offers to the federation, and what it allows. `silotune-agent check` says whether it is in order;
# the agent reads it when it starts.

# --- data sets: one section each; jobs ask for them by name. Rows never leave this machine.
#
# [data.answers]
# path = "answers.csv"            # CSV, JSONL or Parquet; relative to this file
# text = "text"                   # the column with the text
# label = "label"                 # the column with the label
# labels = { "T" = "treatment" }  # values of that column that jobs call by another name
# unknown_labels = "fail"         # or "skip": rows whose label a job does not have
# validation = 0.1                # a share of the rows, or another file
# # encoding = "latin-1"          # default utf-8
# # delimiter = ";"               # default ,

# --- device
[device]
name = "auto"          # "auto" takes the first GPU; or "cpu", "cuda:1"
# threads = 4          # CPU threads of the trainer; default: all cores
# idle_seconds = 600   # the trainer gives its memory back after so long without a task

# --- policy: without this section nothing runs here. Each list names what is allowed; "*" allows all of its kind.
#
# [policy]
# tasks = ["classification"]
# base_models = ["minilm"]        # names or digests (silotune-agent model list)
# data_sets = ["answers"]
# methods = ["full", "lora"]
# max_epochs = 5                  # passes over the data in one round
# min_rows = 100                  # refuse jobs on data sets with fewer rows
# approval = "ask"                # each new job waits for `silotune-agent approve`; or "automatic"

# --- /metrics, /healthz, /readyz
[http]
address = "127.0.0.1:9481"
"""


def write(path: Path) -> bool:
    """Whether a first file was written; an existing one is left as it is."""
    if path.exists():
        return False
    path.write_text(TEXT)
    return True
