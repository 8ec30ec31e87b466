"""The base models of an experiment: where they lie, or made here, once."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

from client_agent.models import HUB_PATTERNS, check_hub_name
from client_agent.taskdir import read_json, write_json
from deploy.lab.experiment import LabModel, SmallEncoder
from deploy.local import LocalFederation
from protos.errors import Conflict, NotFound

MAKE_SECONDS = 24 * 3600.0


def directory_of(wanted: LabModel, *, made: Path, threads: int, say: Callable[[str], None]) -> Path:
    """Where the model lies; one that is to be made is made at `made`, unless it is there.

    NotFound: it is not on this machine. InvalidInput: no repository of the hub can have that name. Conflict:
    another one was made there. CommandFailed: it could not be made.
    """
    if wanted.path is not None:
        if not Path(wanted.path).is_dir():
            raise NotFound(f"There is no base model in {wanted.path}.", hint="Give its directory, or a hub name.")
        return Path(wanted.path)
    if wanted.hub is not None:
        return _in_hub_cache(check_hub_name(wanted.hub), revision=wanted.revision)
    assert wanted.make is not None
    made.parent.mkdir(parents=True, exist_ok=True)
    record, asked = made.with_name(f"{made.name}.json"), wanted.make.model_dump(mode="json")
    # Several labs may share the folder.
    with made.with_name(f".{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists() and read_json(record) not in (None, asked):
            raise Conflict(
                f"{made} was made in another way than lab.toml says.", hint="Give another folder with --out."
            )
        if not made.exists():
            say(f"Making the base model {made.name}.")
            unfinished = made.with_name(f"{made.name}.new")
            shutil.rmtree(unfinished, ignore_errors=True)
            sizes = {**wanted.make.model_dump(exclude_none=True), "threads": threads or 1}
            options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
            maker = "make_trio" if isinstance(wanted.make, SmallEncoder) else "make_llama"
            words = ["python", "-m", f"deploy.lab.{maker}", str(unfinished), *options]
            LocalFederation(made.parent).run(*words, timeout_seconds=MAKE_SECONDS)
            write_json(record, asked)
            unfinished.rename(made)
    return made


def _in_hub_cache(repository: str, *, revision: str | None) -> Path:
    # Here, because it loads slowly.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=HUB_PATTERNS, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        at, option = (f" at {revision}", f" --revision {revision}") if revision else ("", "")
        raise NotFound(
            f"The hub cache of this machine does not hold {repository}{at}.",
            hint=f"`hf download {repository}{option}` puts it there.",
        ) from None
