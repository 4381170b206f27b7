"""`docs/algorithm.md` against the code: its examples run, its files exist, its tables name what there is."""

import re
from pathlib import Path

import pytest

from groupwise.objective import CHOICES, PRESETS, Objective

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_examples_run(example: str) -> None:
    exec(compile(example, "docs/algorithm.md", "exec"), {})


def test_files_exist() -> None:
    named = set(re.findall(r"`([a-z_/]+\.py)`", PAGE))
    assert len(named) > 10
    assert sorted(name for name in named if not (ROOT / "src" / "groupwise" / name).is_file()) == []


def test_choices_and_presets_are_all_named() -> None:
    corrections = {"token_", "sequence_", "truncate", "mask", "none"}  # the page names them by their two halves
    words = set(re.findall(r"`([a-z0-9_]+)`", PAGE))
    known = {value for column, values in CHOICES.items() if column != "importance_sampling" for value in values}
    assert known | set(PRESETS) | set(CHOICES) | corrections <= words


def test_every_field_of_a_preset_that_the_table_shows_is_a_default_or_shown() -> None:
    """A preset that changes a field which the page's table has no column for would go untold."""
    shown = {"baseline", "scale", "ratio", "surrogate", "weights", "kl", "beta", "epsilon", "epsilon_high"}
    for name, objective in PRESETS.items():
        others = {field for field in Objective.__dataclass_fields__ if field not in shown}
        assert all(getattr(objective, field) == getattr(Objective(), field) for field in others), name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_presets_row_shows_its_numbers(name: str) -> None:
    (row,) = re.findall(rf"^\| .*`{name}`.* \|.*arXiv.*$", PAGE, re.MULTILINE)
    objective = PRESETS[name]
    expected = {"clip": [objective.epsilon, objective.epsilon_high], "cispo": [objective.epsilon_high]}
    expected["sapo"] = [objective.sapo_temperature_pos, objective.sapo_temperature_neg]
    numbers = [float(number) for number in re.findall(r"(?<![\d:k])\d[\d.]*(?:e-\d)?(?=[ ,])", row.split("arXiv")[0])]
    assert numbers == expected[objective.surrogate] + ([objective.beta] if objective.needs_reference else [])
    assert objective.weights.replace("_", " ") in row
