"""What an export says in its config and on its card; the whole way is in `test_end_to_end.py`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from groupwise.config import Job
from groupwise.store.export import model_card
from groupwise.store.written import older_rope_keys
from tests.doubles import a_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}


@pytest.mark.parametrize(
    "parameters, expected",
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (YARN, {"rope_theta": 1e6, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
        (
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (None, {}),
    ],
    ids=["plain", "scaled", "by layer", "without rope"],
)
def test_the_older_rope_keys_say_the_same(parameters: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    assert older_rope_keys({"rope_parameters": parameters}) == expected


def a_job(model: str = "org/base", data: str = "org/data") -> dict[str, Any]:
    values = {"model": {"path": model}, "data": {"path": data}, "reward": {"functions": ["rewards.py:score"]}}
    return Job.model_validate(values).model_dump(mode="json")


FIRST, LAST = {"accuracy": 0.25, "reward": 0.5}, {"accuracy": 0.75, "reward": 1.5}


def a_state(**evaluation: Any) -> dict[str, Any]:
    return {"evaluation": {"first": None, "last": None, "at_step": None, **evaluation}, "clock": {"seconds": 61.4}}


def test_the_card_names_base_data_job_and_result() -> None:
    card = model_card(a_job(), a_checkpoint(a_state(first=FIRST, last=LAST, at_step=10), step=12))
    assert "base_model: org/base\n" in card
    for said in ("`org/base`", "`org/data`", "12 steps", "`grpo`", "`rewards.py:score`"):
        assert said in card
    assert "accuracy 0.250 before and 0.750 after 10 steps, reward 0.500 before and 1.500 after 10 steps; 61 s" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == a_job()


@pytest.mark.parametrize("base", ["builtin:arithmetic", "./models/mine", "/models/mine", "."])
def test_a_base_that_is_on_no_hub_is_not_linked(base: str) -> None:
    assert "base_model" not in model_card(a_job(base), None)


def test_the_card_claims_what_was_measured_and_nothing_else() -> None:
    assert "Held-out" not in model_card(a_job(), a_checkpoint(a_state()))
    assert "Held-out" not in model_card(a_job(), None), "the base itself"
    best = model_card(a_job(), a_checkpoint({"value": 0.8125}))
    assert "Held-out reward: 0.812, the best of its run" in best
    unscored = model_card(a_job(), a_checkpoint(a_state(first={"accuracy": 0.0}, last=LAST, at_step=3)))
    assert "accuracy 0.000 before and 0.750 after" in unscored
    assert "reward 1" not in unscored
