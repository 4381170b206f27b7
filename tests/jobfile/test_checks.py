import pytest

from groupwise.config import BUILTIN, Job, ObjectiveSection
from groupwise.errors import ConfigError
from groupwise.jobfile import load_job
from groupwise.jobfile.checks import problems

OWN = {"model": "my-model", "data": "prompts.jsonl", "reward": "rewards.py:score"}

STEPS = ["reward.step_functions=['s.py:f']"]


def load(*overrides, **options):
    return load_job(overrides=overrides, options=OWN | options)


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["sampling.num_generations=1"], "every advantage would be 0"),
        (["sampling.temperature=0"], "nothing to compare"),
        (["sampling.top_p=0.9"], "ratios are biased"),
        (["sampling.top_k=50"], "ratios are biased"),
        (["sampling.min_p=0.1"], "ratios are biased"),
        (["sampling.min_completion_length=4"], "draws from the whole distribution"),
        (["objective.preset=cispo", "objective.epsilon=0.2"], "no effect"),
        (["objective.preset=cispo", "objective.epsilon_high=0.3"], "cap of the ratio"),
        (["objective.preset=sapo", "objective.epsilon_high=0.3"], "no effect"),
        (["objective.preset=sapo", "objective.dual_clip=3"], "no effect"),
        (["objective.epsilon=1.5"], "never bind"),
        (["objective.preset=dapo", "objective.kl=k3"], "no KL penalty"),
        (["objective.importance_sampling_cap=5"], "no effect"),
        (["reward.weights=[1, 2]"], "2 values for the functions rewards.py:score"),
        (["reward.functions=['rewards.py']"], "file.py:name"),
        (["reward.functions=['rewards.py:']"], "file.py:name"),
        (["train.updates_per_batch=9"], "one group per prompt"),
        (["train.steps=10", "train.warmup_steps=11"], "10 updates in all"),
        (["train.tokens_per_micro_batch=100"], "has to fit"),
        (["eval.every=10"], "no held-out prompts"),
        (["reward.step_functions=['steps.py']"], "file.py:name"),
        ([*STEPS, "reward.step_weights=[1, 2]"], "2 values for the functions s.py:f"),
        (["reward.device=cpu"], "says where reward models compute, and none is named"),
        (["reward.functions=['model:']"], "does not say where and what"),
        ([*STEPS, "reward.step_tags=['a', 'b', 'c']"], "no effect where no reward model scores steps"),
        (["reward.step_functions=['model:m']", "reward.step_tags=['a', 'b']"], "has 2 entries. It takes three"),
        (["reward.weights=[]", "reward.functions=[]"], "no step is scored either"),
        (["objective.process_weight=1"], "nothing scores steps"),
        (["objective.outcome_weight=0"], "every advantage would be 0"),
        ([*STEPS, "objective.process_weight=0", "objective.outcome_weight=0"], "every advantage would be 0"),
        (["objective.step_return=mean"], "no effect where steps do not count"),
        ([*STEPS, "objective.process_weight=0", "objective.step_normalization=index"], "no effect where steps"),
        (["process.segmenter=blank_line"], "no effect where no step is scored"),
        (["process.pattern='a'"], "no effect where no step is scored"),
        ([*STEPS, "process.pattern='a'"], 'no effect with `process.segmenter` = "newline"'),
        ([*STEPS, "process.segmenter=pattern"], "needs `process.pattern`, and it is not set"),
        ([*STEPS, "process.segmenter=pattern", "process.pattern=''"], "is empty"),
        ([*STEPS, "process.segmenter=pattern", "process.pattern='('"], "no regular expression"),
        ([*STEPS, "process.segmenter=pattern", "process.pattern='a*'"], "matches nothing at all"),
        ([*STEPS, "process.segmenter=token_ids"], "needs `process.token_ids`"),
        ([*STEPS, "process.segmenter=function", "process.function=cut"], "file.py:name"),
        ([*STEPS, "reward.functions=[]", "objective.outcome_weight=1"], "`reward.functions` is empty"),
        ([*STEPS, "eval.data=held.jsonl", "reward.functions=[]"], "what is held out is judged by it"),
        (["eval.num_generations=4"], "the same output 4 times"),
        (["model.path='builtin:arithmetic'", "model.revision=main"], "no effect"),
        (["data.path='builtin:arithmetic'", "data.subset=main"], "no effect"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_its_reason(overrides, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        load(*overrides)
    assert f"`{overrides[-1].partition('=')[0]}`" in str(caught.value)


def test_steps_of_ones_own_data_need_a_function_of_ones_own() -> None:
    with pytest.raises(ConfigError, match=r"needs a reward of its own(.|\n)*step_functions = "):
        load_job("arithmetic-process", options=OWN)


def test_steps_alone_need_no_reward_of_outputs() -> None:
    for source in (None, "arithmetic"):
        found = load_job(source, ["eval.every=0"], OWN | {"reward": None, "step_reward": "s.py:f"})
        assert found.job.reward.functions == []
        assert found.origins["reward.functions"] == "--step-reward"
    assert load_job(options={"step_reward": "s.py:f"}).job.reward.functions == [BUILTIN], "the built-in data has one"
    assert load(step_reward="s.py:f").job.reward.functions == ["rewards.py:score"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampling.num_generations=2"],
        ["objective.preset=cispo", "objective.epsilon_high=1"],
        ["objective.epsilon=inf", "objective.epsilon_high=inf"],
        ["objective.preset=dapo", "objective.kl=k3", "objective.beta=0.01"],
        ["objective.kl=k2", "objective.beta=0.1"],
        [*STEPS, "objective.outcome_weight=0", "objective.step_return=mean", "objective.step_normalization=index"],
        [*STEPS, "objective.process_weight=0", "eval.data=held.jsonl"],
        [*STEPS, "process.segmenter=token_ids", "process.token_ids=[5, 6]"],
        ["reward.functions=['model:org/name']", "reward.device='cuda:1'"],
        ["reward.step_functions=['model:m']", "reward.step_tags=['ки', '+', '-']"],
        [*STEPS, "process.segmenter=pattern", "process.pattern='(?=Step)'", "reward.step_weights=[2]"],
        [*STEPS, "process.segmenter=function", "process.function=cut.py:ends"],
        ["objective.importance_sampling=token_mask", "objective.importance_sampling_cap=5"],
        ["train.updates_per_batch=8"],
        ["train.steps=10", "train.warmup_steps=10"],
        ["eval.every=10", "eval.data=held-out.jsonl"],
        ["eval.data=h.jsonl", "eval.num_generations=4", "eval.temperature=1", "eval.top_p=0.9"],
    ],
)
def test_what_is_unusual_but_can_work_is_allowed(overrides):
    load(*overrides)


def test_data_of_ones_own_is_never_scored_by_the_built_in_reward_unasked():
    with pytest.raises(ConfigError, match="needs a reward of its own"):
        load(reward=None)
    assert load(reward=BUILTIN).job.reward.functions == [BUILTIN]


@pytest.mark.parametrize("origin", ["default", "recipe arithmetic"])
def test_a_recipes_reward_counts_as_unasked(origin):
    job = Job(data={"path": "prompts.jsonl"})
    assert any("needs a reward" in text for text in problems(job, {"reward.functions": origin}))
    assert not list(problems(job, {"reward.functions": "job.toml"}))


def test_a_key_without_effect_is_refused_for_exactly_the_presets_that_ignore_it():
    from groupwise.objective import PRESETS  # here, since it brings torch

    for preset, objective in PRESETS.items():
        for name, value in {"epsilon": 0.1, "epsilon_high": 1.5, "dual_clip": 3.0, "kl": "k3"}.items():
            job = Job(objective=ObjectiveSection(preset=preset, **{name: value}))
            refused = any("no effect" in text for text in problems(job, {"reward.functions": "default"}))
            assert refused == (name in objective.ignored_fields), (preset, name)
