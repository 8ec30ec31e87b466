from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from deploy import figures


def test_no_two_of_many_lines_look_alike() -> None:
    looks = {tuple(str(value) for _, value in sorted(figures.style(number).items())) for number in range(30)}
    assert len(looks) == 30
    # Next to each other they differ in all three.
    first, second = figures.style(0), figures.style(1)
    assert all(first[name] != second[name] for name in ("color", "marker", "linestyle"))


def test_small_multiples_are_two_beside_each_other_on_common_axes(tmp_path: Path) -> None:
    made, axes = figures.panels(["a", "b", "c"], height_inches=1.0)
    assert [own.get_title() for own in axes] == ["a", "b", "c"]
    axes[0].plot([0, 1], [0, 5])
    assert axes[2].get_ylim() == axes[0].get_ylim()
    assert made.get_figheight() == 2.0 and made.get_figwidth() == figures.WIDE_INCHES


def test_a_figure_is_drawn_for_light_and_for_dark_pages(tmp_path: Path) -> None:
    def of(shown: list[int], ink: str) -> Figure:
        made, axes = figures.figure(height_inches=0.8)
        axes.plot(shown, color=ink)
        return made

    figures.draw({"line": of}, [1, 2], directory=tmp_path)
    light, dark = (tmp_path / "line.png").read_bytes(), (tmp_path / "line-dark.png").read_bytes()
    assert light.startswith(b"\x89PNG") and dark.startswith(b"\x89PNG") and light != dark
