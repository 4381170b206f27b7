"""Algorithm 1 whole, event by event, and what a round of the reward model does by itself."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from groupwise.config import RewardModelSection
from groupwise.data.stream import PromptStream
from groupwise.engines.mailbox import Mailbox
from groupwise.errors import DataError, RewardError
from groupwise.objective import objective_named
from groupwise.progress import Progress
from groupwise.reward_models import rounds
from groupwise.reward_models.labels import FileLabels, LabelSource, VerifierLabels, VerifierPairs
from groupwise.reward_models.reservoir import RoundSamples
from groupwise.reward_models.rounds import RewardModelRounds, Task
from groupwise.reward_models.text import Row
from groupwise.rewards.patience import Patience
from groupwise.rewards.scorer import Scorer
from groupwise.run import loop
from groupwise.run.evaluate import NoEvaluation
from groupwise.run.rollouts import GroupSampler, Rollouts
from groupwise.seeds import stable_hash
from groupwise.types import Group, Sampling
from groupwise.watch.metrics import unknown
from groupwise.watch.record import Record, Recorder
from groupwise.watch.terminal import make_terminal
from tests.doubles import Log, MemorySink, ScriptedEngine, ScriptedLearner, ScriptedReward, prompts, through_a_file
from tests.run.test_loop import PASSES, Checkpoints

LETTERS = "abcdefgh"
SEED, SHARE = 3, 0.3
HELD_OUT = {c for c in LETTERS if stable_hash(SEED, "held-out", json.dumps(c)) < SHARE * 2**63}
PER_STEP, OUTPUTS, FIRST = 4, 2, 6


class Pupil:
    """A reward model's learner that writes down what it is taught: two updates make a round, if there is anything."""

    def __init__(self, log: Log, stop: Any = lambda update: None) -> None:
        self.log, self.done, self.stop = log, 0, stop
        self.model = SimpleNamespace(kind="outcome", version=0, encode=lambda judged: Row((1, 2)))
        self.settings, self.token_budget = None, SimpleNamespace(halved=0)

    @property
    def version(self) -> int:
        return self.model.version

    def updates(self, examples: Sequence[Any], epochs: int | None = None) -> Iterator[dict[str, float]]:
        for number in range(self.done, 2 if examples else 0):
            self.log.append(("learn", number, len(examples), f"epochs {epochs}"))
            self.stop(number)
            self.done = (number + 1) % 2
            self.model.version += number
            yield {"loss": 0.5 - 0.1 * number, "epoch": 1.0}

    def check(self) -> None:
        """Every update was applied."""

    def evaluate_encoded(self, examples: Sequence[Any]) -> dict[str, float]:
        self.log.append(("try", len(examples), f"version {self.version}"))
        return {"accuracy": 0.5 + 0.1 * self.version}

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"reward_model": {}, "reward_optimizer": {}}, {"version": self.version, "done": self.done}

    def load_state_dict(self, tensors: Any, counters: Any) -> None:
        self.model.version, self.done = counters["version"], counters["done"]


class Judge(ScriptedReward):
    """The reward model as a reward: it thinks that every output is right with a chance of 0.75."""

    def __init__(self, log: Log, pupil: Pupil) -> None:
        super().__init__(lambda text: float(text[-1]), "reward_model", log)
        self.pupil = pupil

    def __call__(self, groups: Sequence[Group], context: Any) -> Any:
        self.log.append(("judged by", f"version {self.pupil.version}"))
        context.extras["reward_model/right"] = [0.75] * sum(len(group.completions) for group in groups)
        return super().__call__(groups, context)


class Verifier(ScriptedReward):
    """Even numbers are right."""

    def __init__(self, log: Log) -> None:
        super().__init__(lambda text: float(int(text) % 2 == 0), "verifier")
        self.outer = log

    def __call__(self, groups: Sequence[Group], context: Any) -> Any:
        self.outer.append(("verify", len(groups)))
        return super().__call__(groups, context)


class Bench:
    """A run over doubles: 4 of 8 questions a step, two outputs each, six questions before the first step."""

    def __init__(
        self, tmp_path: Path, *, iterations: int = 1, labels: LabelSource | None = None, **settings: Any
    ) -> None:
        self.log: Log = []
        self.sink = MemorySink()
        self.progress = Progress(iterations, 2)
        self.pupil = Pupil(self.log)
        self.engine = ScriptedEngine(self.log)
        self.mailbox = Mailbox(self.engine)
        section = RewardModelSection(first_prompts=FIRST, **{"held_out_share": SHARE, "replay": 0.25, **settings})
        self.watch = Recorder([self.sink], make_terminal("quiet", total_steps=0, title=""), None)
        asked = prompts(*LETTERS)
        self.verifier = Scorer([Verifier(self.log)], None, 2, lambda message: None)
        first = GroupSampler(Sampling(), OUTPUTS, SEED, "reward_model")
        task = Task(
            learner=self.pupil, labels=labels or VerifierLabels(1.0), verifier=self.verifier, threshold=1.0,  # type: ignore[arg-type]
            first=lambda: first.sample(self.mailbox, asked[:FIRST], 0), settings=section, seed=SEED,
            progress=self.progress, watch=self.watch, model_folder=tmp_path / "model",
        )  # fmt: skip
        collected = RoundSamples(section.prompts_per_round, SEED, {prompt.prompt_id: prompt for prompt in asked})
        self.rounds = RewardModelRounds(task, collected)
        scorer = Scorer([Judge(self.log, self.pupil)], None, 2, lambda message: None)
        stream = PromptStream(asked, seed=0, shuffle=False)
        self.parts = loop.Parts(
            progress=self.progress,
            rollouts=Rollouts(stream, self.mailbox, scorer, GroupSampler(Sampling(), OUTPUTS, 5, "train"), PER_STEP),
            objective=objective_named("grpo"),
            learner=ScriptedLearner(self.log),
            rounds=self.rounds,
            evaluation=NoEvaluation(),
            checkpoints=Checkpoints(self.log),
            watch=self.watch,
            num_iterations=PASSES,
        )

    @property
    def told(self) -> list[dict[str, Any]]:
        """The events of rounds."""
        return [event for event in self.sink.events if "reward_model/round" in event]


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double has no weights to write."""
    monkeypatch.setattr(rounds, "save_reward_model", lambda learner, target: learner.log.append(("write",)))


def numbers(letters: str) -> tuple[int, int]:
    """How many examples of these questions' outputs are learned from, and how many are held out."""
    held = sum(letter in HELD_OUT for letter in letters)
    return OUTPUTS * (len(letters) - held), OUTPUTS * held


def test_one_outer_iteration_is_algorithm_1(tmp_path: Path) -> None:
    assert 0 < len(HELD_OUT & set(LETTERS[:FIRST])) < FIRST
    bench = Bench(tmp_path)
    loop.train(bench.parts)
    new, held = numbers(LETTERS[:FIRST])
    new_1, held_1 = numbers(LETTERS)
    old = round(new_1 / 3)  # a quarter of the mixture
    assert bench.log == [
        # A reward model from the initial policy's outputs, labelled by the verifier.
        *(("sample", f"reward_model/0/{slot}", "version 0") for slot in range(FIRST)),
        ("verify", FIRST),
        ("try", held, "version 0"),
        ("learn", 0, new, "epochs None"),
        ("learn", 1, new, "epochs None"),
        ("try", held, "version 1"),
        ("write",),
        ("round over",),
        ("reference", 0, "version 0"),
        *step(1, version=0),
        *step(2, version=2),
        # The new training set is of this iteration's samples, verified already; a quarter is of the round before.
        ("try", held_1, "version 1"),
        ("learn", 0, new_1 + old, "epochs None"),
        ("learn", 1, new_1 + old, "epochs None"),
        ("try", held_1, "version 2"),
        ("write",),
        ("round over",),
        ("finish",),
    ]


def step(number: int, version: int) -> Log:
    first = number % 2 == 1
    keys = [(number, slot, str(slot if first else slot + PER_STEP)) for slot in range(PER_STEP)]
    return [
        *(("sample", f"train/{number}/{slot}", f"version {version}") for slot in range(PER_STEP)),
        ("judged by", "version 1"),
        ("score", keys),
        ("subtract kl",),
        ("prepare", f"version {version}"),
        *(("update", done, f"old {version}", "reference 0") for done in range(PASSES)),
        ("verify", PER_STEP),
        ("load", f"version {version + PASSES}"),
        ("save?", number),
    ]


def test_the_next_iteration_is_scored_by_the_new_model_and_its_round_replays_both(tmp_path: Path) -> None:
    bench = Bench(tmp_path, iterations=3)
    loop.train(bench.parts)
    judged = [entry[1] for entry in bench.log if entry[0] == "judged by"]
    assert judged == [f"version {v}" for v in (1, 1, 2, 2, 3, 3)]
    assert [entry[1] for entry in bench.log if entry[0] == "reference"] == [0, 1, 2]
    assert [event["reward_model/round"] for event in bench.told] == [0, 1, 2, 3]
    new, held = numbers(LETTERS)
    for event in bench.told[1:]:
        assert event["reward_model/new"] == new
        assert event["reward_model/held_out"] == held
        assert event["reward_model/replayed"] == round(new / 3)
    assert [event["reward_model/version"] for event in bench.told] == [1, 2, 3, 4]
    assert [event["reward_model/eval/accuracy"] for event in bench.told] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert [event["reward_model/before/accuracy"] for event in bench.told] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert all(event["reward_model/loss"] == pytest.approx(0.45) for event in bench.told), "of both updates"
    assert not any(unknown(event) for event in bench.sink.events)


def test_the_gap_is_what_the_model_says_more_than_the_verifier(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    loop.train(bench.parts)
    steps = [event for event in bench.sink.events if "reward" in event]
    right = [
        sum(int(output.text) % 2 == 0 for one in bench.told and outputs for output in one) / (PER_STEP * OUTPUTS)
        for outputs in sampled(bench)
    ]
    for event, share in zip(steps, right, strict=True):
        assert event["reward_model/verified"] == share
        assert event["reward_model/predicted"] == 0.75
        assert event["reward_model/unverified"] == 0
        assert event["reward_model/gap"] == pytest.approx(0.75 - share)
        assert event.get("reward_model/ranked_right", 0.5) == 0.5, "it does not tell any two apart"


def sampled(bench: Bench) -> list[list[Sequence[Any]]]:
    """Per step, the outputs of its groups, drawn again."""
    stream = PromptStream(prompts(*LETTERS), seed=0, shuffle=False)
    draw = GroupSampler(Sampling(), OUTPUTS, 5, "train")
    return [
        [group.completions for group in draw.sample(Mailbox(ScriptedEngine()), stream.take(PER_STEP), number)]
        for number in (1, 2)
    ]


def test_without_first_prompts_the_model_is_trained_already(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.rounds.done = 1  # as with `first_prompts` 0
    loop.train(bench.parts)
    assert bench.log[0] == ("reference", 0, "version 0")
    assert [event["reward_model/round"] for event in bench.told] == [1]
    assert RewardModelRounds(
        SimpleNamespace(settings=RewardModelSection(first_prompts=0), seed=0),  # type: ignore[arg-type]
        RoundSamples(1, 0, {}),
    ).done == 1  # fmt: skip


def test_a_round_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    """Between its updates; the means are those of all of them, the comparison is with the model before the first."""
    whole = Bench(tmp_path)
    loop.train(whole.parts)
    half = Bench(tmp_path)
    half.pupil.stop = lambda number: setattr(half.progress, "stopped", signal.SIGTERM) if number == 0 else None
    loop.train(half.parts)
    assert half.log[-1] == ("finish",)
    assert not half.told
    assert half.rounds.done == 0
    rest = Bench(tmp_path)
    rest.rounds.restore(through_a_file(half.rounds.state()))
    loop.train(rest.parts)
    learned = next(entry for entry in rest.log if entry[0] == "learn")
    assert learned == ("learn", 1, numbers(LETTERS[:FIRST])[0], "epochs None")
    clockless = [
        [{k: v for k, v in event.items() if not k.startswith(("time/", "tokens/"))} for event in bench.sink.events]
        for bench in (whole, rest)
    ]
    assert clockless[0] == clockless[1]


def test_a_stop_in_the_middle_of_an_iteration_trains_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.rounds.done = 1
    bench.progress.step, bench.progress.stopped = 1, signal.SIGTERM
    bench.rounds.update(bench.parts.checkpoints)
    bench.progress.stopped = None
    bench.rounds.update(bench.parts.checkpoints)
    assert bench.log == []


def test_state_and_lines_bring_rounds_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.progress.total = 2
    loop.train(bench.parts)
    groups = GroupSampler(Sampling(), 2, 1, "x").sample(Mailbox(ScriptedEngine()), prompts("a"), 3)
    bench.rounds.add(bench.verifier(groups, Record(3)), Record(3))
    other = Bench(tmp_path)
    saved = through_a_file(bench.rounds.state())
    other.rounds.restore(saved)
    assert through_a_file(other.rounds.state()) == saved
    assert saved.lines["collected.jsonl"]


def test_equal_outputs_of_a_question_are_one_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.doubles.random.Random", lambda seed: SimpleNamespace(randrange=lambda n: 4))
    bench = Bench(tmp_path)
    loop.train(bench.parts)
    learned = [event["reward_model/new"] + event["reward_model/held_out"] for event in bench.told]
    assert learned == [FIRST, 2 * PER_STEP]


def test_pairs_are_learned_where_there_are_any(tmp_path: Path) -> None:
    """A policy that gets everything right leaves nothing to compare: its round trains nothing, and nothing breaks."""
    bench = Bench(tmp_path, iterations=2, labels=VerifierPairs(1.0), min_accuracy=0.5)
    judge = bench.verifier.rewards[0]
    by_chance = judge.value  # type: ignore[attr-defined]
    judge.value = lambda text: float(bench.progress.step > 0 or by_chance(text))  # type: ignore[attr-defined]
    loop.train(bench.parts)
    pairs = [len({int(o.text) % 2 for o in group.completions}) == 2 for group in first()]
    assert bench.told[0]["reward_model/new"] + bench.told[0]["reward_model/held_out"] == sum(pairs) > 0
    assert bench.told[0]["reward_model/unlabelled"] == OUTPUTS * (FIRST - sum(pairs))
    assert [event["reward_model/round"] for event in bench.told] == [0, 1, 2]
    later = bench.told[1:]
    assert all(event["reward_model/new"] == event["reward_model/updates"] == 0 for event in later)
    assert [event["reward_model/version"] for event in later] == [1, 1]
    steps = [event for event in bench.sink.events if "reward" in event]
    assert not any("reward_model/gap" in event for event in steps), "scores of pairs are no probabilities"
    assert not any(unknown(event) for event in bench.sink.events)


def first() -> Sequence[Group]:
    """What is sampled before the first step, drawn again."""
    return GroupSampler(Sampling(), OUTPUTS, SEED, "reward_model").sample(
        Mailbox(ScriptedEngine()), prompts(*LETTERS)[:FIRST], 0
    )


def test_a_bad_reward_model_stops_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, min_accuracy=0.65)
    with pytest.raises(RewardError, match=r"After round 0 .* held-out accuracy is 0\.600, .*min_accuracy` is 0\.65"):
        loop.train(bench.parts)
    assert ("round over",) in bench.log, "what the round made is kept: the bound may be lowered"
    assert not any(entry[0] == "reference" for entry in bench.log)


def test_the_bound_holds_after_a_resume_too_and_may_be_lowered(tmp_path: Path) -> None:
    before = Bench(tmp_path, min_accuracy=0.65)
    with pytest.raises(RewardError):
        loop.train(before.parts)
    state = through_a_file(before.rounds.state())
    again, lower = Bench(tmp_path, min_accuracy=0.65), Bench(tmp_path, min_accuracy=0.6)
    for bench in (again, lower):
        bench.rounds.restore(state)
    with pytest.raises(RewardError, match="After round 0"):
        loop.train(again.parts)
    loop.train(lower.parts)
    assert [event["reward_model/round"] for event in lower.told] == [1]


def test_a_run_that_gets_a_reward_model_in_its_middle_trains_for_what_comes(tmp_path: Path) -> None:
    """As a fork does: the first round is made then, and none for iterations that were without one."""
    bench = Bench(tmp_path, iterations=4)
    bench.progress.step = 5  # in the third of four iterations, of two steps each
    bench.rounds.start_at(5)
    loop.train(bench.parts)
    assert [event["reward_model/round"] for event in bench.told] == [0, 3, 4]
    trained = Bench(tmp_path, iterations=4)
    trained.rounds.done, trained.progress.step = 1, 5
    trained.rounds.start_at(5)
    loop.train(trained.parts)
    assert [event["reward_model/round"] for event in trained.told] == [3, 4]


def test_a_bound_needs_something_to_hold_against_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path, min_accuracy=0.65, held_out_share=1e-9)
    with pytest.raises(RewardError, match="accuracy is -"):
        loop.train(bench.parts)
    assert capsys.readouterr().err.count("nothing of this round is held out") == 1


def test_what_the_verifier_does_not_score_is_counted_and_in_no_training_set(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    verifier = bench.verifier.rewards[0]
    verifier.value = lambda text: None if int(text) % 3 == 0 else 1.0  # type: ignore[attr-defined]
    loop.train(bench.parts)
    steps = [event for event in bench.sink.events if "reward" in event]
    silent = [sum(int(o.text) % 3 == 0 for group in step for o in group) for step in sampled(bench)]
    assert sum(silent) > 0
    assert [event["reward_model/unverified"] for event in steps] == silent
    last = bench.told[1]
    assert last["reward_model/unlabelled"] == sum(silent)
    learned = last["reward_model/new"] + last["reward_model/held_out"]
    assert learned == 2 * PER_STEP * OUTPUTS - sum(silent)


def test_nothing_to_learn_from_is_an_error(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.verifier.rewards[0].value = lambda text: None  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"Round 0 .* nothing to learn from: none of 12 outputs has a label"):
        loop.train(bench.parts)
    bench = Bench(tmp_path, held_out_share=1 - 1e-9)
    with pytest.raises(DataError, match="all of its examples are held out"):
        loop.train(bench.parts)


def test_a_file_is_read_anew_in_each_round(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"

    def write(n: int) -> None:
        rows = [{"prompt": letter, "completion": str(i), "label": i % 2} for letter in LETTERS for i in range(n)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(1)
    bench = Bench(tmp_path, labels=FileLabels(str(file)))
    maybe = bench.parts.checkpoints.maybe
    bench.parts.checkpoints.maybe = lambda step: (write(3), maybe(step))  # type: ignore[method-assign, assignment]
    loop.train(bench.parts)
    assert not any(entry[1].startswith("reward_model/") for entry in bench.log if entry[0] == "sample")
    new = [event["reward_model/new"] for event in bench.told]
    assert new[1] == 3 * new[0] == 3 * (len(LETTERS) - len(HELD_OUT))


def test_held_out_examples_that_cannot_be_read_are_no_reason_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once, and rounds go on without an evaluation."""

    def encode(judged: Any) -> Row:
        if judged.prompt in HELD_OUT:
            raise DataError("Prompt and output have 99 tokens, and at most 40 fit.")
        return Row((1, 2))

    bench = Bench(tmp_path)
    bench.watch.terminal = make_terminal("plain", total_steps=2, title="")
    bench.pupil.model.encode = encode
    loop.train(bench.parts)
    assert not [entry for entry in bench.log if entry[0] == "try"]
    assert len(bench.told) == 2
    said = capsys.readouterr().err
    assert said.count("nothing of this round is held out that can be read (Prompt and output have 99 tokens") == 1


def test_a_verifier_that_gives_nothing_step_after_step_ends_the_run_when_the_step_is_saved(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    patience = bench.verifier.patience = bench.parts.rollouts.scorer.patience = Patience(2, 99)
    [verifier] = bench.verifier.rewards
    right = verifier.value  # type: ignore[attr-defined]
    verifier.value = lambda text: None if bench.progress.step else right(text)  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match=r"Reward `verifier` gave no value \(None\) for any output of 2 steps"):
        loop.train(bench.parts)
    assert bench.log[-1] == ("save?", 2)
    assert patience.state().values["streaks"]["verifier/rewards/verifier"]["steps"] == 2
