"""The public names, as a list: one is added or taken away here on purpose, and never by accident."""

import subprocess
import sys

import pytest

import groupwise


def test_the_packages_names_are_these():
    names = [
        "GroupwiseError", "__version__", "doctor", "evaluate", "export", "label", "objective", "plan", "resume",
        "sample", "train", "train_reward_model",
    ]  # fmt: skip
    assert groupwise.__all__ == names
    assert dir(groupwise) == sorted(groupwise.__all__)
    assert all(hasattr(groupwise, name) for name in groupwise.__all__)


def test_the_objectives_names_are_these():
    assert groupwise.objective.__all__ == [
        "CHOICES",
        "PRESETS",
        "Objective",
        "TokenLosses",
        "group_advantages",
        "k1_per_output",
        "less_kl",
        "objective_named",
        "outcome_advantages",
        "policy_loss",
        "process_advantages",
        "token_advantages",
        "token_losses",
        "token_weights",
    ]
    assert all(hasattr(groupwise.objective, name) for name in groupwise.objective.__all__)


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'trian'"):
        groupwise.trian  # noqa: B018


@pytest.mark.parametrize("module", ["groupwise", "groupwise.jobfile"])
def test_what_is_needed_early_is_quick_to_import(module):
    """Measured by what it brings along, which no busy machine can blur."""
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert {"torch", "transformers", "numpy", "datasets", "pandas", "rich"}.isdisjoint(loaded)


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert version("groupwise") == groupwise.__version__
