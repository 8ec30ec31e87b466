"""The site.toml that enrollment writes: every choice is explained, and nothing is allowed until somebody says so."""

from __future__ import annotations

import json
import os
from pathlib import Path

from client_agent import settings
from client_agent.route import Proxy
from client_agent.settings import Network
from protos.errors import Conflict, InvalidInput

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
#
# [data.advice]                   # a table to tune a language model on
# path = "advice.jsonl"
# instruction = "instruction"     # the column with the instruction
# input = "input"                 # the column with what it is about, where there is one besides the instruction
# output = "output"               # the column with the answer to learn
#
# [data.medqa]                    # questions with options, under the name of a benchmark
# path = "medqa.parquet"
# question = "question"           # the column with the question
# options = "options"             # the column with the list of options
# answer = "answer"               # the column with the right one's place in that list, from 0

# --- device
[device]
name = "auto"          # "auto" takes the first GPU; or "cpu", "cuda:1"
# threads = 4          # CPU threads of the trainer; default: all cores
# processes = 1        # trainers that do a task together, each on a GPU of its own from `name` on
# idle_seconds = 600   # the trainer gives its memory back after so long without a task
# stop_seconds = 30    # what a stopped agent waits for its training to be saved; its service must grant more

# --- policy: without this section nothing runs here. Each list names what is allowed; "*" allows all of its kind.
#
# [policy]
# tasks = ["classification"]      # and "causal-lm", to tune language models on instructions; "distill", which only
#                                 # a house agent is asked for: a teacher here trains what the sites have learnt
# base_models = ["minilm"]        # names or digests (silotune-agent model list)
# fetch_base_models = true        # such a model is fetched from the coordinator, where it has it and this site does not
# data_sets = ["answers"]
# methods = ["full", "lora"]
# max_epochs = 5                  # passes over the data in one round
# min_rows = 100                  # refuse jobs on data sets with fewer rows
# approval = "ask"                # each new job waits for `silotune-agent approve`; or "automatic"

# --- network: needed only where the way to the coordinator is not plain
#
# [network]
# proxy = "http://proxy.hospital:3128"      # or http://USER:PASSWORD@...; default: https_proxy of the environment;
#                                           # what its no_proxy names is dialled directly in any case
# ca_bundle = "/etc/ssl/hospital.pem"       # CAs that may vouch for the coordinator besides the federation's own
# upload_mbit = 20                          # Mbit/s of payload; default: without limit
# download_mbit = 50
# hours = ["19:00-06:00"]                   # transfers run only then; default: always
# keepalive_seconds = 20                    # less, down to 5, where a firewall forgets idle connections
#
# [[network.windows]]                       # other rates for some hours
# hours = "Mon-Fri 08:00-18:00"
# upload_mbit = 5
# download_mbit = 20

# --- hours in which the trainer may use this machine; default: always. A training that is cut off goes on at the next.
#
# [schedule]
# hours = ["Mon-Fri 19:00-06:00", "Sat-Sun 00:00-24:00"]

# --- /metrics, /healthz, /readyz
[http]
address = "127.0.0.1:9481"
"""


def network_with(path: Path, *, proxy: str, ca_bundle: str) -> Network:
    """The [network] of the site file with what enrollment was told; empty text is not told.

    InvalidInput: not the URL of a proxy. Conflict: the file says something else.
    """
    try:
        settings.check_proxy(proxy)
    except ValueError as error:
        raise InvalidInput(f"--proxy: {error}.") from None
    site = settings.load(path) if path.exists() else settings.SiteSettings()
    told = {name: text for name, text in (("proxy", proxy), ("ca_bundle", ca_bundle)) if text}
    for name, text in told.items():
        if "network" in site.model_fields_set and getattr(site.network, name) != text:
            raise Conflict(
                f"{path} has a [network] section with another {name}.",
                hint="Change it there; enrollment without the option goes by that file.",
            )
    return site.network.model_copy(update=told)


def write(path: Path, *, network: Network) -> bool:
    """Whether a first file was written. An existing one is left as it is, but for a [network] that it does not have."""
    fresh = not path.exists()
    if fresh:
        # For its owner only: a proxy's password may come to stand in it.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(TEXT)
    told = {name: text for name, text in (("proxy", network.proxy), ("ca_bundle", network.ca_bundle)) if text}
    if told and "network" not in settings.load(path).model_fields_set:
        if Proxy(network.proxy).login:
            path.chmod(0o600)
        with path.open("a") as file:
            file.write("\n[network]\n" + "".join(f"{name} = {json.dumps(text)}\n" for name, text in told.items()))
    return fresh
