"""Every shipped recipe parses and resolves, so that none is shipped broken."""

import pytest

from groupwise.jobfile import load_job, recipe_names, show


def test_the_embedded_recipe_is_shipped():
    assert "arithmetic" in recipe_names()
    assert load_job().job == load_job("arithmetic").job


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_resolves(name):
    resolved = load_job(name)
    assert f"recipe {name}" in resolved.origins.values()
    assert show(resolved)
