from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deploy.demo import page, plots


@pytest.fixture
def html(made: dict[str, Any], tmp_path: Path) -> str:
    plots.draw(made, directory=tmp_path)
    return page.render(made, plots=tmp_path)


def test_every_figure_is_drawn_for_light_and_dark(made: dict[str, Any], tmp_path: Path):
    plots.draw(made, directory=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}{ending}.png" for name in plots.FIGURES for ending in ("", "-dark")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_the_page_needs_no_other_file_and_no_network(html: str):
    assert not re.search(r'(src|srcset|href)="(?!data:)', html)
    assert "<script" not in html and "@import" not in html
    assert html.count("data:image/png;base64,") == 2 * len(plots.FIGURES)


def test_the_page_fits_a_phone_and_follows_the_readers_colours(html: str):
    assert 'name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_says_what_was_found(html: str):
    assert "87.5 %" in html
    assert "gains 17.5 points" in html
    assert "stays 2.5 points" in html
    assert "1 of 2 institutes have" in html


def test_what_comes_from_outside_is_escaped(html: str):
    assert "init &lt;here&gt;" in html and "<here>" not in html


def test_a_federation_that_loses_nothing_is_not_called_short(made: dict[str, Any], tmp_path: Path):
    made["pooled_accuracy"] = 0.87
    plots.draw(made, directory=tmp_path)
    assert "loses nothing against pooling" in page.render(made, plots=tmp_path)


def test_each_figure_has_words_for_those_who_cannot_see_it(html: str):
    assert all(re.findall(r'alt="([^"]*)"', html))
