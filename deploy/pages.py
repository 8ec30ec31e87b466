"""HTML pages with everything in them: one file, readable on a phone, in light and in dark, without a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deploy.figures import ENDINGS


def render(template: Path, *, plots: Path, figures: Iterable[str], **shown: Any) -> str:
    """The page of a template that extends deploy/page.html; `plots` holds the figures that it names."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(percent=percent, megabytes=megabytes, minutes=minutes, size=size)
    images = {
        name: {
            theme: base64.b64encode((plots / f"{name}{ending}.png").read_bytes()).decode()
            for theme, ending in ENDINGS.items()
        }
        for name in figures
    }
    return environment.get_template(template.name).render(images=images, **shown)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def size(value: float) -> str:
    """Small and large ones beside each other in one table."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= least:
            return f"{value / least:,.1f} {unit}"
    return f"{value:.0f} B"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
