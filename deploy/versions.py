"""Which code figures were made with: ours by its commit, and the packages that numbers depend on."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("silotune", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "grpcio")
GIT_SECONDS = 10


@functools.cache
def versions() -> dict[str, str]:
    """{"python": ..., "commit": ..., package: version}; what is not installed, or is no checkout, is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str:
    """The commit of this checkout, "+" behind it where files differ from it; empty outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=GIT_SECONDS, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # No git, or not the owner's checkout: figures do not wait for it.
