"""Rounds of a reward model inside a run: a new training set from an iteration's samples, and replay (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from groupwise.config import TRAINED_REWARD_MODEL, RewardModelSection
from groupwise.errors import DataError, RewardError, RunFolderError
from groupwise.learn.optimizer import REFUSED
from groupwise.progress import Progress
from groupwise.readable import ROUND, number
from groupwise.reward_models.examples import load_examples
from groupwise.reward_models.export import save_reward_model
from groupwise.reward_models.labels import LabelSource, Row
from groupwise.reward_models.learner import EncodedSet, RewardLearner, encode_examples, encode_readable
from groupwise.reward_models.metrics import PREFIX, against_verifier
from groupwise.reward_models.replay import ReplayStore
from groupwise.reward_models.reservoir import RoundSamples, distinct
from groupwise.reward_models.text import Example, prompt_of
from groupwise.rewards.scorer import Scorer
from groupwise.seeds import stable_hash
from groupwise.state import Lazily, State
from groupwise.types import Group, Scored
from groupwise.watch.record import Record, Recorder, warn_of_refused


class Saving(Protocol):
    """Saves a run whose round is over."""

    def round_over(self) -> None:
        """Save now, where anything is saved."""


class Rounds(Protocol):
    """What the loop asks of them."""

    def add(self, scored: Scored, record: Record) -> None:
        """Take a step's outputs into the next training set, and hold the model's scores against the verifier's."""

    def update(self, saving: Saving) -> None:
        """Train the reward model for every iteration that is over and has had no round."""

    def start_at(self, step: int) -> None:
        """Begin in the middle of a run that had no reward model: what is over is over."""

    def state(self) -> State:
        """See `Stateful`."""

    def restore(self, state: State) -> None:
        """See `Stateful`. Without values it is of a run that had no reward model."""


class NoRounds:
    """Stands where no reward model is trained."""

    def add(self, scored: Scored, record: Record) -> None:
        """Nothing is collected."""

    def update(self, saving: Saving) -> None:
        """Nothing is trained."""

    def start_at(self, step: int) -> None:
        """Nothing begins."""

    def state(self) -> State:
        """No state."""
        return State()

    def restore(self, state: State) -> None:
        """No state."""


@dataclass(frozen=True)
class Task:
    """What rounds work with. `first` samples the outputs of the first round, `model_folder` is where the trained model
    is written after each."""

    learner: RewardLearner
    labels: LabelSource
    verifier: Scorer | None
    threshold: float
    first: Callable[[], Sequence[Group]]
    settings: RewardModelSection
    seed: int
    progress: Progress
    watch: Recorder
    model_folder: Path


@dataclass
class _UnderWay:
    """A round that was interrupted: what the model was like before it, and its updates so far."""

    before: dict[str, float] = field(default_factory=dict)
    updates: list[dict[str, float]] = field(default_factory=list)


class RewardModelRounds:
    """Trains the job's reward model: round 0 before the first step, round `i` after iteration `i` (from 1).

    `done` counts the rounds that are over. A round is a function of what was collected, the replay store and the
    reward model, all of which are in the checkpoint: killed inside, it is repeated, or gone on with, to the bit.
    """

    def __init__(self, task: Task, collected: RoundSamples) -> None:
        self.task, self.collected = task, collected
        self.done = 0 if task.settings.first_prompts else 1
        self.replay = ReplayStore(task.settings.replay_size, task.seed)
        self._under_way: _UnderWay | None = None
        self._last: dict[str, Any] | None = None
        self._told = False

    def add(self, scored: Scored, record: Record) -> None:
        """See `Rounds`. `reward_model/gap` is by how much the model's probabilities of being right are above what the
        verifier says of the same outputs, in the mean; a model that learns from pairs gives none.
        `reward_model/ranked_right` is the share of the pairs of a right and a wrong output of a group in which the
        model puts the right one above: all that advantages are made from."""
        if self.task.verifier is None:
            return
        with record.time("verify"):
            verified = self._verified([one.group for one in scored])
        right = [None if r is None else float(r >= self.task.threshold) for one in verified for r in one.rewards]
        predicted = record.extras.get(f"{TRAINED_REWARD_MODEL}/right", [None] * len(right))
        sizes = [len(one.scores) for one in verified]
        found = against_verifier(predicted, right, sizes, probable=not self.replay.compares)
        record.metrics |= {f"{PREFIX}{name}": value for name, value in found.items()}
        if self.task.labels.reads_outputs:
            self.collected.add(verified)

    def update(self, saving: Saving) -> None:
        """See `Rounds`. Asked to stop, it leaves the rest of a round to the run that resumes."""
        progress = self.task.progress
        self._guard()
        while self.done * progress.steps_per_iteration <= progress.step and not progress.stopped:
            record = Record(progress.step)
            with record.time("step"):
                self._round(record)
            if self._under_way is not None:
                return
            with self.task.watch.step(progress.step) as event:
                event.metrics |= record.metrics
            saving.round_over()
            self._guard()

    def start_at(self, step: int) -> None:
        """See `Rounds`. The next round is that of the iteration under way, unless the first is still to be made."""
        if self.done:
            self._over(step)

    def _over(self, step: int) -> None:
        self.done = step // self.task.progress.steps_per_iteration + 1

    def _round(self, record: Record) -> None:
        task, learner, n = self.task, self.task.learner, self.done
        with record.time("label"):
            new, held_out = self._new_examples(record)
        old = self.replay.draw(len(new), task.settings.replay, n)
        rows = _examples([*new, *old], learner)
        encoded = encode_examples(learner.model, rows) if rows else EncodedSet([], 0, "")
        with record.time("reward_model"):
            if self._under_way is None:
                self._under_way = _UnderWay(self._tried(held_out))
            epochs = task.settings.first_epochs if n == 0 else None
            for metrics in learner.updates(encoded.examples, epochs):
                self._under_way.updates.append(metrics)
                warn_of_refused(metrics, task.watch, f"reward model, round {n}: ")
                learner.check()
                if task.progress.stopped and learner.done:
                    return
            after = self._tried(held_out)
        self.replay.add(new, n)
        self.collected.clear()
        save_reward_model(learner, task.model_folder)
        record.metrics |= _summary(self._under_way, after) | {
            ROUND: float(n), f"{PREFIX}version": float(learner.version), f"{PREFIX}new": float(len(new)),
            f"{PREFIX}replayed": float(len(old)), f"{PREFIX}held_out": float(len(held_out)),
            f"{PREFIX}dropped": float(encoded.dropped), f"{PREFIX}budget_halved": float(learner.token_budget.halved),
        }  # fmt: skip
        if after or not self.replay.compares:
            self._last = {"round": n, "accuracy": after.get("accuracy")}
        self._under_way = None
        self._over(task.progress.step)

    def _new_examples(self, record: Record) -> tuple[list[Row], list[Row]]:
        """The round's new examples: to be learned, and of prompts that are held out in every round.

        Raises DataError where there is nothing to be learned; not of pairs after the first round, of which a policy
        that gets all outputs of a question right, or all wrong, leaves none.
        """
        task = self.task
        verified: Scored = ()
        if task.labels.reads_outputs:
            if self.done == 0:
                verified = [distinct(one) for one in self._verified(task.first())]
            else:
                verified = self.collected.scored
        rows = task.labels(verified)
        outputs = sum(len(one.scores) for one in verified)
        used = {(row["step"], row["slot"], i) for row in rows for i in row["outputs"]} if verified else set()
        record.metrics[f"{PREFIX}unlabelled"] = float(outputs - len(used))
        limit = task.settings.held_out_share * 2**63
        held = [
            stable_hash(task.seed, "held-out", prompt_of(example)) < limit for example in _examples(rows, task.learner)
        ]
        new = [row for row, out in zip(rows, held, strict=True) if not out]
        if not new and not self.replay.compares:
            found = f"none of {outputs} outputs has a label" if not rows else "all of its examples are held out"
            raise DataError(
                f"Round {self.done} of the reward model has nothing to learn from: {found} (labels: "
                f"{task.labels.name}). Look at the verifier, or raise reward_model.prompts_per_round."
            )
        return new, [row for row, out in zip(rows, held, strict=True) if out]

    def _verified(self, groups: Sequence[Group]) -> Scored:
        verifier, record = self.task.verifier, Record(self.task.progress.step)
        assert verifier is not None
        verified = verifier(groups, record)
        verifier.patience.count_quietly([replace(one, key=f"verifier/{one.key}") for one in record.outcomes])
        return verified

    def _tried(self, rows: Sequence[Row]) -> dict[str, float]:
        learner = self.task.learner
        found = encode_readable(learner.model, _examples(rows, learner))
        if not found.examples and not self._told:
            self._told = True
            why = f" that can be read ({found.reason.rstrip('.')})" if rows else ""
            self.task.watch.terminal.warn(
                f"nothing of this round is held out{why}, so nothing tells how good the reward model is: raise "
                "reward_model.held_out_share or reward_model.prompts_per_round"
            )
        return learner.evaluate_encoded(found.examples) if found.examples else {}

    def _guard(self) -> None:
        """Hold what the last round came to against the bound; after a resume too, which may have changed it."""
        bound, last = self.task.settings.min_accuracy, self._last
        if bound is None or last is None or (last["accuracy"] is not None and last["accuracy"] >= bound):
            return
        raise RewardError(
            f"After round {last['round']} the reward model's held-out accuracy is {number(last['accuracy'])}, and "
            f"`reward_model.min_accuracy` is {bound:g}: a policy would learn to please it, not to be right. More "
            "labelled outputs (first_prompts, prompts_per_round), more epochs or a better backbone help; lower the "
            "bound to go on all the same."
        )

    def state(self) -> State:
        """See `Rounds`."""
        way = self._under_way
        under_way = None if way is None else {"before": way.before, "updates": way.updates}
        tensors, counters = self.task.learner.state_dict()
        values = {"done": self.done, "last": self._last, "under_way": under_way, "learner": counters}
        kept: dict[str, ReplayStore | RoundSamples] = {"replay.jsonl": self.replay, "collected.jsonl": self.collected}
        lines = Lazily({name: partial(_text_of, one) for name, one in kept.items()})
        return State(tensors, values, lines)

    def restore(self, state: State) -> None:
        """See `Rounds`. Raises RunFolderError where the checkpoint is of another reward model, or what it replays does
        not go with the job's labels, DataError where it is of other prompts."""
        if not state.values:
            self.start_at(self.task.progress.step)
            return
        found = {name: state.tensors[name] for name in ("reward_model", "reward_optimizer")}
        self.task.learner.load_state_dict(found, state.values["learner"])
        self.done, self._last = state.values["done"], state.values["last"]
        under_way = state.values["under_way"]
        self._under_way = None if under_way is None else _UnderWay(**under_way)
        self.replay.load(state.lines["replay.jsonl"].splitlines())
        labels, replayed = self.task.labels, self.replay.compares
        if len(self.replay) and labels.compares is (not replayed):
            holds, makes = ("pairs", "single outputs") if replayed else ("single outputs", "pairs")
            raise RunFolderError(
                f"The checkpoint replays {len(self.replay)} earlier examples that are {holds}, and "
                f'`reward_model.labels` = "{labels.name}" makes {makes}: one round cannot learn from both. Keep the '
                "labels that the run had, or start a run with the folder's reward_model as `reward_model.path` and "
                "`first_prompts` = 0."
            )
        self.collected.load(state.lines["collected.jsonl"].splitlines())


def _examples(rows: Sequence[Mapping[str, Any]], learner: RewardLearner) -> list[Example]:
    return load_examples(rows, learner.model.kind) if rows else []


_OF_AN_UPDATE = ("epoch", "tokens", "budget_halved", REFUSED)
"""What has no mean over a round's updates."""


def _summary(round_: _UnderWay, after: Mapping[str, float]) -> dict[str, float]:
    """Means over the updates, and what held-out examples said before and after them."""
    names = dict.fromkeys(name for metrics in round_.updates for name in metrics if name not in _OF_AN_UPDATE)
    found = {name: fmean(metrics[name] for metrics in round_.updates if name in metrics) for name in names}
    found |= {"updates": float(len(round_.updates)), REFUSED: float(sum(one.get(REFUSED, 0) for one in round_.updates))}
    found |= {f"before/{name}": value for name, value in round_.before.items()}
    found |= {f"eval/{name}": value for name, value in after.items()}
    return {f"{PREFIX}{name}": value for name, value in found.items()}


def _text_of(kept: ReplayStore | RoundSamples) -> str:
    return "".join(f"{line}\n" for line in kept.lines())
