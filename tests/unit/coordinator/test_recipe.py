"""Each test writes a recipe with one fault, and reads the sentence that an operator gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import recipe
from protos.errors import RecipeInvalid

GOOD = """\
# A first recipe.
name = "questions"
rounds = 5

[task]
type = "classification"
labels = [
  "cause", # ]
  "symptom",
]

[data]
name = "passages"

[base_model]
name = "minilm"

[local]
steps = 8
learning_rate = 2e-4
schedule.type = "linear"

[cohort]
sites = ["gard", "ninds"]
quorum = 2
"""


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error for the good recipe with one text replaced by another."""
    monkeypatch.chdir(tmp_path)

    def read(old: str, new: str) -> RecipeInvalid:
        assert old in GOOD
        path = Path("recipe.toml")
        path.write_text(GOOD.replace(old, new))
        with pytest.raises(RecipeInvalid) as caught:
            recipe.read(path)
        return caught.value

    return read


def test_a_good_recipe_is_read(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD)
    assert recipe.read(path).cohort.quorum == 2


def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_known_one(fault):
    error = fault("learning_rate = 2e-4", "learning_rat = 2e-4")
    assert error.message == "recipe.toml:20: local.learning_rat is not a known key."
    assert error.hint == "Did you mean local.learning_rate?"


def test_a_key_in_the_wrong_table_is_pointed_to_the_right_one(fault):
    error = fault("rounds = 5", "rounds = 5\nbatch_size = 8")
    assert error.message == "recipe.toml:4: batch_size is not a known key."
    assert error.hint == "Did you mean local.batch_size?"


def test_a_key_like_no_other_lists_what_its_table_has(fault):
    error = fault("quorum = 2", "patience = 2")
    assert error.message.startswith("recipe.toml:25: cohort.patience")
    assert error.hint.startswith("[cohort] has gather_seconds, quorum,")


def test_a_missing_key_is_shown_at_its_table(fault):
    assert fault('name = "minilm"\n', "").message == "recipe.toml:15: base_model.name is missing."


def test_a_missing_table_is_shown_at_the_beginning(fault):
    error = fault('[local]\nsteps = 8\nlearning_rate = 2e-4\nschedule.type = "linear"\n', "")
    assert error.message == "recipe.toml:1: local is missing."


def test_a_word_that_is_no_choice_lists_the_choices(fault):
    error = fault("steps = 8", 'steps = 8\noptimizer = "adam"')
    assert error.message == 'recipe.toml:20: local.optimizer must be "sgd" or "adamw", not "adam".'


def test_a_union_says_both_of_its_branches(fault):
    error = fault("quorum = 2", 'size = "most"')
    assert error.message == 'recipe.toml:25: cohort.size must be "all" or a whole number, not "most".'


def test_an_entry_of_a_list_is_found(fault):
    error = fault('"ninds"', '"St Olav"')
    assert error.message.startswith("recipe.toml:24: cohort.sites.1 must be a site name")


def test_a_contradiction_is_shown_at_the_key_that_it_names(fault):
    assert fault("quorum = 2", "quorum = 3").message == (
        "recipe.toml:25: cohort: quorum is 3, but only 2 sites are named."
    )


def test_a_contradiction_between_tables_is_shown_where_it_is_written(fault):
    error = fault("[cohort]", "[aggregation]\nmax_share = 0.2\n\n[cohort]")
    assert error.message.startswith("recipe.toml:24: recipe: max_share 0.2 cannot hold for 2 sites")


def test_a_fault_after_a_value_of_several_lines_has_its_own_line(fault):
    error = fault("]\n\n[data]", "]\nmax_length = 1\n\n[data]")
    assert error.message == "recipe.toml:11: task.max_length must be at least 4, not 1."


def test_an_inline_table_is_searched_too(fault):
    error = fault('schedule.type = "linear"', 'schedule = { type = "linear", final = 2 }')
    assert error.message == "recipe.toml:21: local.schedule.final must be at most 1.0, not 2."


def test_a_dotted_key_is_searched_too(fault):
    error = fault('schedule.type = "linear"', 'schedule.kind = "linear"')
    assert error.message == "recipe.toml:21: local.schedule.kind is not a known key."


@pytest.mark.parametrize(
    ("new", "begins"),
    [
        ("rounds = ", "recipe.toml:3: this is not valid TOML: invalid value"),
        ("rounds = 5\nrounds = 6", "recipe.toml:4: this is not valid TOML: cannot overwrite a value"),
    ],
)
def test_what_is_no_toml_is_shown_with_its_line(fault, new: str, begins: str):
    assert fault("rounds = 5", new).message.startswith(begins)


def test_what_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_bytes('name = "Zürich"'.encode("latin-1"))
    with pytest.raises(RecipeInvalid, match="byte 9 is not UTF-8"):
        recipe.read(path)


def test_arrays_of_tables_are_counted():
    text = '[[site]]\nname = "a"\n\n[[site]]\nname = "b"\n[site.data]\nrows = 1\n'
    assert recipe.line_of(text, key="site.0.name") == 2
    assert recipe.line_of(text, key="site.1.name") == 5
    assert recipe.line_of(text, key="site.1.data.rows") == 7
    assert recipe.line_of(text, key="site.1.data.columns") == 6


def test_a_bracket_in_a_text_of_several_lines_ends_nothing():
    text = 'a = """\n[b]\nc = 1\n"""\nc = 2\n'
    assert recipe.line_of(text, key="c") == 5
