"""Functions that score steps: what they are handed, what they may return, and what happens when they fail."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from groupwise.errors import RewardError
from groupwise.rewards.base import RewardContext
from groupwise.rewards.functions.load import load_stepwise
from groupwise.rewards.patience import BOUNDARY_STEPS, Patience
from groupwise.rewards.steps import Cut, Cuts, by_pattern
from groupwise.rewards.stepwise import FunctionStepReward, StepReward, StepScorer
from groupwise.tokenizer.codec import Codec
from groupwise.types import Completion, Group, GroupKey, Prompt, Score, ScoredGroup
from groupwise.watch.metrics import unknown
from tests.doubles import through_a_file
from tests.rewards.groups import listening
from tests.tiny_tokenizers import character_level

CODEC = Codec(character_level("abc \n"))
Function = Callable[..., Any]


def group(*texts: str, slot: int = 0, answer: str = "a") -> Group:
    """Outputs of one token per character."""
    prompt = Prompt(f"row-{slot}", f"question {slot}", (1,), {"answer": answer})
    outputs = (Completion(CODEC.encode_text(text), text, (0.0,) * len(text), "stop") for text in texts)
    return Group(GroupKey(0, slot, prompt.prompt_id), prompt, tuple(outputs))


GROUPS = [group("a\nb", "c"), group("ab\n", "a\nb\nc", slot=1, answer="b")]
TEXTS = [["a\n", "b"], ["c"], ["ab\n"], ["a\n", "b\n", "c"]]


def step_reward(function: Any, **limits: float) -> FunctionStepReward:
    return FunctionStepReward(load_stepwise(function, place="step_rewards", kind="step reward function", **limits))


def scored(
    *rewards: StepReward, groups: Sequence[Group] = GROUPS, weights: Sequence[float] | None = None,
    context: RewardContext | None = None,
) -> list[list[list[tuple[int, float | None]]]]:  # fmt: skip
    """Per group and output the ends and rewards that a scorer finds, cut at line breaks."""
    scorer = StepScorer(by_pattern(CODEC, "\n"), list(rewards), weights)
    return [found.steps for found in scorer(bare(groups), context or listening()[0], training=True)]


def bare(groups: Sequence[Group]) -> list[ScoredGroup]:
    return [ScoredGroup(one, tuple(Score(1.0) for _ in one.completions)) for one in groups]


def lengths(steps: list[list[str]], **columns: Any) -> list[list[float]]:
    return [[float(len(step)) for step in output] for output in steps]


def test_a_function_over_lists_gets_steps_beside_every_column() -> None:
    seen: dict[str, Any] = {}

    def score(**given: Any) -> list[list[float]]:
        seen.update(given)
        return lengths(given["steps"])

    found = scored(step_reward(score))
    assert found == [[[(2, 2.0), (3, 1.0)], [(1, 1.0)]], [[(3, 3.0)], [(2, 2.0), (4, 2.0), (5, 1.0)]]]
    assert seen["steps"] == TEXTS
    assert seen["completions"] == ["a\nb", "c", "ab\n", "a\nb\nc"]
    assert seen["prompts"] == ["question 0"] * 2 + ["question 1"] * 2
    assert seen["answer"] == ["a", "a", "b", "b"]


def test_a_function_that_names_steps_alone_gets_lists() -> None:
    found: list[Any] = []
    scored(step_reward(lambda steps, answer: found.append((steps, answer)) or lengths(steps)))
    assert found == [(TEXTS, ["a", "a", "b", "b"])]


def test_a_function_of_one_output_gets_its_own_steps() -> None:
    def score(prompt: str, completion: str, steps: list[str], answer: str) -> list[float]:
        assert "".join(steps) == completion
        return [float(answer in step) for step in steps]

    assert scored(step_reward(score))[1] == [[(3, 1.0)], [(2, 0.0), (4, 1.0), (5, 0.0)]]


def test_an_async_function_may_log() -> None:
    async def score(steps: list[list[str]], log_metric: Any, log_extra: Any) -> list[list[float]]:
        log_metric("mine", 3.0)
        log_extra("why", [len(output) for output in steps])
        return lengths(steps)

    context, _ = listening()
    reward = step_reward(score)
    scored(reward, context=context)
    reward.close()
    assert (context.metrics["mine"], context.extras["why"]) == (3.0, [2, 1, 1, 3])


def test_none_is_not_scored_for_a_step_or_a_whole_output() -> None:
    found = scored(step_reward(lambda steps: [[None, 1.0], None, [0.5], [1.0, None, 0.0]]))
    assert found == [[[(2, None), (3, 1.0)], [(1, None)]], [[(3, 0.5)], [(2, 1.0), (4, None), (5, 0.0)]]]


def test_several_functions_are_weighed_and_told_apart() -> None:
    def score(steps: list[list[str]]) -> list[list[float | None]]:
        return [[None if "b" in step else 1.0 for step in output] for output in steps]

    context, _ = listening()
    found = scored(step_reward(lengths), step_reward(score), weights=[0.5, 10.0], context=context)
    assert found[0] == [[(2, 11.0), (3, 0.5)], [(1, 10.5)]]
    assert context.metrics["step_rewards/lengths/mean"] == pytest.approx(12 / 7)
    assert context.metrics["step_rewards/score/mean"] == 1.0
    assert unknown(context.metrics) == []
    context, _ = listening()
    scored(step_reward(score), step_reward(score), context=context)
    assert {"step_rewards/score/failed", "step_rewards/score_2/failed"} <= context.metrics.keys()


@pytest.mark.parametrize("given", [[[1.0, 2.0, 3.0], [1.0], [1.0], [1.0] * 3], [[1.0], [1.0], [1.0], [1.0] * 3]])
def test_a_wrong_count_names_function_output_and_both_counts(given: list[list[float]]) -> None:
    with pytest.raises(RewardError) as error:
        scored(step_reward(lambda steps: given))
    message = str(error.value)
    assert f"step reward function `lambda` returned {len(given[0])} values for the 2 steps of an output" in message
    assert "prompt row-0: 'question 0'" in message
    assert "output 1 of 2: 'a\\nb'" in message


def test_a_wrong_count_of_outputs_names_both_counts() -> None:
    with pytest.raises(RewardError, match="step reward function `lambda` returned 2 values for 4 outputs"):
        scored(step_reward(lambda steps: [[1.0, 1.0], [1.0]]))
    with pytest.raises(RewardError, match=r"returned float 0\.5; it must return a list of 4 lists, one per output"):
        scored(step_reward(lambda steps: 0.5))


@pytest.mark.parametrize(
    "value, shown",
    [(math.nan, "nan, which is not finite"), (math.inf, "inf, which is"), ("good", "'good', which is of type str")],
)
def test_a_step_that_is_no_number_names_function_prompt_output_and_step(value: object, shown: str) -> None:
    with pytest.raises(RewardError) as error:
        scored(step_reward(lambda steps: [[1.0, 1.0], [1.0], [1.0], [1.0, value, 1.0]]))
    message = str(error.value)
    for part in (f"step reward function `lambda` returned {shown}", "prompt row-1", "output 2 of 2: 'a\\nb\\nc'"):
        assert part in message
    assert "step 2 of 3: 'b\\n'" in message


def test_one_number_in_place_of_a_list_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"returned 1\.0, which is of type float and not a list with one number"):
        scored(step_reward(lambda steps: [[1.0, 1.0], 1.0, [1.0], [1.0] * 3]))


def test_tensors_and_arrays_are_lists() -> None:
    import numpy as np
    import torch

    found = scored(step_reward(lambda steps: [torch.ones(2), np.zeros(1), (1,), torch.tensor([1, 0, 1])]))
    assert found == [[[(2, 1.0), (3, 1.0)], [(1, 0.0)]], [[(3, 1.0)], [(2, 1.0), (4, 0.0), (5, 1.0)]]]


def test_a_function_that_does_not_take_steps_is_refused() -> None:
    with pytest.raises(RewardError, match="step reward function `lambda` does not take `steps`"):
        step_reward(lambda completions: [])


@pytest.fixture
def in_a_file(tmp_path: Path) -> Iterator[Callable[..., FunctionStepReward]]:
    """Write a file and load its `score`."""
    loaded: list[FunctionStepReward] = []

    def make(source: str, **limits: float) -> FunctionStepReward:
        (tmp_path / "steps.py").write_text(textwrap.dedent(source))
        loaded.append(step_reward(f"{tmp_path}/steps.py:score", **limits))
        return loaded[-1]

    yield make
    for reward in loaded:
        reward.close()


def test_a_file_runs_in_a_worker(in_a_file: Callable[..., FunctionStepReward]) -> None:
    reward = in_a_file("import os\ndef score(steps, **rest): return [[os.getppid()] * len(o) for o in steps]")
    import os

    assert scored(reward)[0] == [[(2, float(os.getpid())), (3, float(os.getpid()))], [(1, float(os.getpid()))]]
    assert reward.own_process


def test_a_step_function_that_hangs_costs_only_the_outputs_it_hangs_on(
    in_a_file: Callable[..., FunctionStepReward],
) -> None:
    source = """
    import time
    def score(completion, steps):
        if "c" in steps[0]:
            time.sleep(3600)
        return [1.0] * len(steps)
    """
    context, told = listening()
    found = scored(in_a_file(source, timeout=3.0, output_timeout=3.0), context=context)
    assert found[0] == [[(2, 1.0), (3, 1.0)], [(1, None)]]
    assert found[1][1] == [(2, 1.0), (4, 1.0), (5, 1.0)]
    assert context.metrics["step_rewards/score/failed"] == 1
    assert context.metrics["step_rewards/score/timeouts"] == 2, "of the batch, and of the output alone"
    assert "step reward function `score` failed on an output" in told[0]
    assert "it took longer than 3 s" in told[0]


class Nothing:
    """A segmenter that finds no boundary, and fails where it is told to."""

    name = "nothing"

    def __init__(self, failed: bool = False) -> None:
        self.failed = failed

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Cuts:
        return [[Cut((len(c.token_ids),), (c.text,), False, self.failed) for c in g.completions] for g in groups]

    def close(self) -> None:
        pass


def test_a_segmenter_that_finds_nothing_warns_with_an_output_and_ends_after_so_many_batches() -> None:
    scorer, (context, told) = StepScorer(Nothing(), [step_reward(lengths)], None), listening()
    for _ in range(BOUNDARY_STEPS - 1):
        scorer(bare(GROUPS), context, training=True)
    assert len(told) == 1
    assert "found no boundary in any output" in told[0]
    assert "'a\\nb\\nc'" in told[0], "the longest is shown"
    for _ in range(BOUNDARY_STEPS):
        scorer(bare(GROUPS), context, training=False)
    with pytest.raises(RewardError, match=rf"For {BOUNDARY_STEPS} steps in a row the segmenter found no boundary"):
        scorer(bare(GROUPS), context, training=True)


def test_once_there_was_a_boundary_none_for_long_is_a_warning() -> None:
    scorer, (context, told) = StepScorer(by_pattern(CODEC, "\n"), [step_reward(lengths)], None), listening()
    for one in [group("a\nb", "c")] + [group("a", "b")] * (3 * BOUNDARY_STEPS):
        scorer(bare([one]), context, training=True)
    assert len(told) == 1
    assert f"For {BOUNDARY_STEPS} steps in a row the segmenter found no boundary" in told[0]


def test_the_count_of_steps_without_a_boundary_is_taken_up_where_it_was() -> None:
    patience, context = Patience(), listening()[0]
    scorer = StepScorer(Nothing(), [step_reward(lengths)], None, patience)
    for _ in range(BOUNDARY_STEPS - 1):
        scorer(bare(GROUPS), context, training=True)
    resumed = Patience()
    resumed.restore(through_a_file(patience.state()))
    with pytest.raises(RewardError, match=f"For {BOUNDARY_STEPS} steps in a row"):
        StepScorer(Nothing(), [step_reward(lengths)], None, resumed)(bare(GROUPS), context, training=True)


def test_what_the_segmenter_failed_on_is_not_scored() -> None:
    context, told = listening()
    [found, _] = StepScorer(Nothing(failed=True), [step_reward(lengths)], None)(bare(GROUPS), context, training=True)
    assert found.steps == [[(3, None)], [(1, None)]]
    assert told == [], "which is no boundary to be missed"


def test_what_outputs_earned_is_kept() -> None:
    scorer = StepScorer(by_pattern(CODEC, "\n"), [step_reward(lengths)], None)
    before = ScoredGroup(GROUPS[0], (Score(0.5, parts={"x": 0.5}), Score(None)))
    [found] = scorer([before], listening()[0], training=True)
    assert [score.reward for score in found.scores] == [0.5, None]
    assert found.scores[0].parts == {"x": 0.5}
    assert [step.text for step in found.scores[0].steps] == ["a\n", "b"]


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RewardError, match="2 step reward weights for 1 step reward functions"):
        StepScorer(Nothing(), [step_reward(lengths)], [1.0, 2.0])
