"""`silotune-agent check`: everything that a job would need, looked at before there is one; each finding a sentence."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from client_agent import facts, hold, identity, policy, settings
from client_agent.bandwidth import closed_at, rates_at
from client_agent.home import Home
from client_agent.models import Models
from client_agent.probe import probe
from client_agent.route import Proxy, route_of
from client_agent.settings import DataSet, Network, SiteSettings
from client_agent.training.data import Instructions, Rows, read
from client_agent.training.questions import Question
from client_agent.training.tables import Split
from protos.errors import SilotuneError

FEW_GIGABYTES = 5
SHOWN_LABELS = 12


@dataclass(frozen=True)
class Finding:
    subject: str
    ok: bool
    sentence: str


def all_findings(home: Home) -> Iterator[Finding]:
    """One finding after another, as each is known; reads all data and all models."""
    try:
        site, fault = settings.load(home.site_file), ""
    except SilotuneError as error:
        site, fault = SiteSettings(), str(error)
    yield from _identity(home, site.network)
    if fault:
        yield Finding("site.toml", False, fault)
        return
    if Proxy(site.network.proxy).login and home.site_file.stat().st_mode & 0o077:
        what = f"{home.site_file} holds the proxy's password and others may read it: `chmod 600 {home.site_file}`"
        yield Finding("site.toml", False, what)
    yield Finding("bandwidth", True, _bandwidth(site.network))
    yield Finding("hours", True, _hours(home, site))
    yield Finding("policy", site.policy is not None, policy.in_words(site.policy))
    yield from _policy_names(home, site)
    if not site.data:
        wanted = site.policy is None or bool(site.policy.data_sets)
        yield Finding("data", not wanted, "site.toml describes no data set; only jobs without data can run")
    for name, data_set in site.data.items():
        yield from _data_set(name, data_set.at(home.site_file.parent))
    yield from _models(home, site)
    yield _device(site)
    yield _disk(home)


def _identity(home: Home, network: Network) -> Iterator[Finding]:
    try:
        enrolled = identity.load(home.identity)
    except SilotuneError as error:
        yield Finding("identity", False, str(error))
        return
    try:
        enrolled.check_valid(now=identity.utc_now())
    except SilotuneError as error:
        yield Finding("certificate", False, str(error))
    else:
        yield Finding(
            "certificate",
            True,
            f"this is {enrolled.name} ({enrolled.role}), valid until {enrolled.expires:%Y-%m-%d %H:%M} UTC",
        )
    try:
        route = route_of(network, ca=enrolled.ca, directory=home.site_file.parent)
    except SilotuneError as error:
        yield Finding("network", False, str(error))
        return
    own = (home.identity / identity.CERTIFICATE, home.identity / identity.KEY)
    found = [probe(address, route=route, own=own) for address in enrolled.addresses]
    # One address that answers is enough to work; of the others it is said that they do not.
    enough = any(one.reachable for one in found)
    for address, one in zip(enrolled.addresses, found, strict=True):
        sentence = one.sentence + ("; dialled without the proxy: no_proxy names it" if route.spared(address) else "")
        yield Finding("network" if len(found) == 1 else f"network, {address}", enough, sentence)


def _bandwidth(network: Network) -> str:
    hours = ", ".join(window.hours for window in network.windows)
    now = datetime.now()
    transfers = f"; transfers run only at {', '.join(network.hours)}" if network.hours else ""
    other = f"; other rates may hold at {hours}" if hours else ""
    return (closed_at(network, now) or f"now {rates_at(network, now)}") + other + transfers


def _hours(home: Home, site: SiteSettings) -> str:
    windows = site.schedule.hours
    now = hold.reason(hold.PauseFile(home.pause_file).read(), windows, now=datetime.now())
    return now or f"the trainer may work now; its hours are {', '.join(windows) or 'not limited'}"


def _policy_names(home: Home, site: SiteSettings) -> Iterator[Finding]:
    """Names in the policy that stand for nothing here are most often slips of the pen."""
    if site.policy is None:
        return
    models = Models(home.models_file).all()
    known_models = {model.name for model in models} | {model.digest for model in models}
    for kind, allowed, known in (
        ("base_models", site.policy.base_models, known_models),
        ("data_sets", site.policy.data_sets, set(site.data)),
    ):
        for name in allowed:
            comes = kind == "base_models" and site.policy.fetch_base_models
            if name != policy.EVERYTHING and name not in known and not comes:
                yield Finding("policy", False, f"{kind} names {name!r}, which this site does not have")


def _data_set(name: str, data_set: DataSet) -> Iterator[Finding]:
    splits: list[Split] = ["train"]
    # Nobody trains on questions, so none are split off.
    if data_set.validation and data_set.question is None:
        splits.append("validation")
    if data_set.test is not None:
        splits.append("test")
    for split in splits:
        subject = f"data {name}, {split}"
        try:
            rows = read(data_set, name=name, split=split)
        except SilotuneError as error:
            yield Finding(subject, False, str(error))
        else:
            yield Finding(subject, True, _describe(rows))


def _describe(rows: Rows | Instructions | list[Question]) -> str:
    if isinstance(rows, list):
        return f"{len(rows)} questions with options"
    if isinstance(rows, Instructions):
        skipped = f"; {rows.skipped} rows without instruction or output left out" if rows.skipped else ""
        with_input = sum(1 for row in rows.rows if row.input.strip())
        return f"{len(rows)} rows of instructions, {with_input} of them with an input{skipped}"
    counts = Counter(rows.label_names[label] for label in rows.labels).most_common()
    shown = ", ".join(f"{label} {count}" for label, count in counts[:SHOWN_LABELS])
    more = f" and {len(counts) - SHOWN_LABELS} more" if len(counts) > SHOWN_LABELS else ""
    skipped = f"; {rows.skipped} rows without text or label left out" if rows.skipped else ""
    return f"{len(rows)} rows, {len(counts)} labels: {shown}{more}{skipped}"


def _models(home: Home, site: SiteSettings) -> Iterator[Finding]:
    registry = Models(home.models_file)
    known = registry.all()
    if not known:
        wanted = site.policy is None or (bool(site.policy.base_models) and not site.policy.fetch_base_models)
        yield Finding("base models", not wanted, "none; add one with `silotune-agent model add NAME --path DIR`")
    for model in known:
        subject = f"base model {model.name}"
        try:
            current = registry.current(model.name)
        except SilotuneError as error:
            yield Finding(subject, False, str(error))
            continue
        if current.digest != model.digest:
            sentence = f"its files changed: the digest was {model.digest[:12]} and is {current.digest[:12]} now"
            yield Finding(subject, False, sentence)
        else:
            sentence = f"{current.parameters:,} parameters, {current.size_bytes / 1e6:,.1f} MB, {current.digest[:12]}"
            yield Finding(subject, True, sentence)


def _device(site: SiteSettings) -> Finding:
    gpu = facts.gpu_name()
    device = facts.choose_device(site.device, gpu=gpu)
    if device != "cpu" and not gpu:
        return Finding("device", False, f"site.toml wants {device}, but there is no NVIDIA GPU that this machine knows")
    return Finding("device", True, f"jobs run on {device}" + (f" ({gpu})" if gpu and device != "cpu" else ""))


def _disk(home: Home) -> Finding:
    free = shutil.disk_usage(home.path).free
    return Finding("disk", free >= FEW_GIGABYTES << 30, f"{free / 1e9:,.1f} GB free in the agent's home")
