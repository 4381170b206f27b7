"""The reward model's learner: examples to updates, in rounds that can be interrupted and taken up again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groupwise.errors import DataError, ModelError, RunFolderError
from groupwise.learn.budget import TokenBudget
from groupwise.learn.optimizer import REFUSED, REFUSED_UPDATES, MasterOptimizer, OptimizerSettings
from groupwise.objective.preference import label_losses, preference_losses
from groupwise.reward_models.metrics import Metrics, label_metrics, preference_metrics, step_metrics
from groupwise.reward_models.model import RewardModel
from groupwise.reward_models.score import count_of, logits_of, scores_of, sigmoid
from groupwise.reward_models.text import Example, Graded, Output, Preferred, Row, Steps, rows_of
from groupwise.seeds import stable_hash

ADVICE = "Lower tokens_per_micro_batch, or shorten prompts or outputs."
"""Where memory is not enough."""


@dataclass(frozen=True)
class RewardLearnerSettings:
    """How a reward model is trained. `batch_size` counts the examples of an update, a pair of outputs as one."""

    optimizer: OptimizerSettings
    batch_size: int = 32
    epochs: int = 1
    tokens_per_micro_batch: int = 16384
    compute_dtype: torch.dtype = torch.float32
    seed: int = 0


class Encoded(NamedTuple):
    """An example as rows: of one output, of two (the better one first), or of one output's steps."""

    rows: tuple[Row, ...]
    labels: tuple[float | None, ...]
    """One per logit of the rows; none for a pair."""

    @property
    def terms(self) -> int:
        """How many losses it has."""
        return sum(label is not None for label in self.labels) or int(len(self.rows) == 2)


class _Pass(NamedTuple):
    """Some examples of an update, their part of its loss, and their logits."""

    examples: list[Encoded]
    loss: float
    logits: list[list[float]]


class EncodedSet(NamedTuple):
    """The examples that can be read, how many cannot, and why not the first of those."""

    examples: list[Encoded]
    dropped: int
    reason: str

    def remarks(self) -> Iterator[str]:
        """Why little can be learned from these examples, where that is so."""
        labels = [label for example in self.examples for label in example.labels if label is not None]
        if labels and min(labels) == max(labels):
            yield f"all {len(labels)} labels are {labels[0]:g}: there is nothing to tell apart"
        same = sum(not example.labels and example.rows[0] == example.rows[1] for example in self.examples)
        if same:
            yield f"{same} pairs have the same text as chosen and as rejected, of which nothing is learned"


def encode_examples(model: RewardModel, examples: Sequence[Example]) -> EncodedSet:
    """Examples as `encode_readable` gives them. Raises DataError where nothing is left."""
    encoded = encode_readable(model, examples)
    if not encoded.examples:
        n = encoded.dropped
        why = f" All {n} examples were left out, the first because: {encoded.reason}" if n else ""
        raise DataError(f"There is nothing for a reward model to learn from, or to be tried on.{why}")
    return encoded


def encode_readable(model: RewardModel, examples: Sequence[Example]) -> EncodedSet:
    """Examples as rows; those too long for the model, refused by its tokenizer or without any label are left out."""
    kept: list[Encoded] = []
    reasons: list[str] = []
    for example in examples:
        try:
            encoded = Encoded(tuple(model.encode(judged) for judged in rows_of(example)), _labels(example))
        except DataError as error:
            reasons.append(str(error))
            continue
        if encoded.terms:
            kept.append(encoded)
        else:
            reasons.append("None of its steps has a label.")
    return EncodedSet(kept, len(reasons), reasons[0] if reasons else "")


def updates_in(examples: int, settings: RewardLearnerSettings, epochs: int | None = None) -> int:
    """Optimizer updates of a round over so many examples; an epoch's last update may have fewer."""
    return (epochs or settings.epochs) * math.ceil(examples / settings.batch_size)


class RewardLearner:
    """Holds a reward model, its master weights and optimizer.

    A round is `epochs` passes over one set of examples. `done` counts the updates of the round under way; when the
    last is made, `version` goes up by one and `done` is 0 again. Order is a function of seed and version, so a learner
    that was restored from `state_dict` goes on bit for bit.
    """

    def __init__(self, model: RewardModel, settings: RewardLearnerSettings) -> None:
        self.model, self.settings = model, settings
        model.model.requires_grad_(True)
        self.optimizer = MasterOptimizer(model.model, settings.optimizer, settings.compute_dtype)
        self.token_budget = TokenBudget(settings.tokens_per_micro_batch, model.device, ADVICE)
        self.done = 0
        self._round: str | None = None

    @property
    def version(self) -> int:
        """Rounds that the model has been trained for, also before it came here."""
        return self.model.version

    def updates(self, examples: Sequence[Encoded], epochs: int | None = None) -> Iterator[Metrics]:
        """The updates of the round that are left, each made when it is asked for, as its metrics; `epochs` passes,
        where that is not as the settings say.

        Raises RunFolderError where the round was begun on other examples, ModelError where the loss is not finite.
        """
        epochs = epochs or self.settings.epochs
        total, fingerprint = updates_in(len(examples), self.settings, epochs), _fingerprint(examples)
        if self.done and self._round != fingerprint:
            raise RunFolderError(
                "This round of the reward model was begun on other examples than these. Bring back its data, "
                "tokenizer and length limit, or start a new run."
            )
        self._round = fingerprint
        for batch in islice(self._batches(examples, epochs), self.done, total):
            metrics = self._update(batch)
            self.done += 1
            if self.done == total:
                self.done, self._round = 0, None
                self.model.version += 1
            yield metrics | {"epoch": (self.done or total) / total * epochs}

    def fit(self, examples: Sequence[Example], after: Callable[[Metrics], object] = lambda metrics: None) -> Metrics:
        """A whole round, or what is left of it; `after` is called with each update's metrics. Their means."""
        found = []
        encoded = encode_examples(self.model, examples)
        for metrics in self.updates(encoded.examples):
            found.append(metrics)
            after(metrics)
            self.check()
        names = dict.fromkeys(name for metrics in found for name in metrics)
        means = {name: fmean(metrics[name] for metrics in found if name in metrics) for name in names}
        means |= {REFUSED: float(sum(metrics[REFUSED] for metrics in found))}
        return means | {"updates": float(len(found)), "version": float(self.version), "dropped": float(encoded.dropped)}

    def evaluate(self, examples: Sequence[Example]) -> Metrics:
        """`loss`, `accuracy`, `auc`, `calibration_error`, and of steps what `step_metrics` tells.

        Raises DataError where nothing is left of the examples, ModelError where a score is not finite.
        """
        return self.evaluate_encoded(encode_examples(self.model, examples).examples)

    def evaluate_encoded(self, encoded: Sequence[Encoded]) -> Metrics:
        """The same of examples that are rows already, at least one."""
        rows = [row for one in encoded for row in one.rows]
        found = self.token_budget.run(lambda: logits_of(self.model, rows, self.token_budget.budget))
        logits = self._by_example(found, encoded)
        if not all(math.isfinite(x) for of_example in logits for x in of_example):
            raise ModelError(f"The reward model {self.model.source} gives scores that are not finite.")
        with torch.no_grad():
            losses = _losses(torch.tensor([x for one in logits for x in one], dtype=torch.float64), encoded)
        return {"loss": losses.mean().item()} | _quality(self.model.kind, encoded, logits)

    def score_outputs(self, outputs: Sequence[Output]) -> list[float | None]:
        """The raw logit of each output; None where it cannot be read."""
        found, _ = self.token_budget.run(lambda: scores_of(self.model, outputs, self.token_budget.budget))
        return [None if values is None else values[0] for values in found]

    def score_steps(self, steps: Sequence[Steps]) -> list[list[float] | None]:
        """The probability of being right of each step, per output; None where the output cannot be read."""
        return self.token_budget.run(lambda: scores_of(self.model, steps, self.token_budget.budget))[0]

    def _batches(self, examples: Sequence[Encoded], epochs: int) -> Iterator[list[Encoded]]:
        """The examples of each update: every epoch in its own seeded order."""
        seed, size = self.settings.seed, self.settings.batch_size
        for epoch in range(epochs):
            keys = [stable_hash(seed, "reward-model", self.version, epoch, i) for i in range(len(examples))]
            order = sorted(range(len(examples)), key=keys.__getitem__)
            for start in range(0, len(order), size):
                yield [examples[i] for i in order[start : start + size]]

    def _update(self, batch: Sequence[Encoded]) -> Metrics:
        """One update. The mean is over all losses of the batch, however it is cut into passes."""
        terms = sum(one.terms for one in batch)
        done: list[_Pass] = []

        def accumulate() -> None:
            for part in micro_batches(batch, self.token_budget.budget):
                found = self.model.logits([row for one in part for row in one.rows])
                loss = _losses(found, part).sum() / terms
                loss.backward()
                done.append(_Pass(part, loss.item(), self._by_example(found.tolist(), part)))

        def drop() -> None:
            self.optimizer.zero_grad()
            done.clear()

        self.token_budget.run(accumulate, drop)
        loss = sum(one.loss for one in done)
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            raise ModelError(
                f"The reward model's loss became {loss} at update {self.done + 1}. Lower the learning rate, or look at "
                "the weights that it started from."
            )
        norm, rate = self.optimizer.step()
        parts = [example for one in done for example in one.examples]
        logits = [values for one in done for values in one.logits]
        accuracy = _quality(self.model.kind, parts, logits)["accuracy"]
        tokens = sum(len(row.token_ids) for one in batch for row in one.rows)
        applied = math.isfinite(norm)
        return {
            "loss": loss, "accuracy": accuracy, **({"grad_norm": norm} if applied else {}), "learning_rate": rate,
            "tokens": float(tokens), "budget_halved": float(self.token_budget.halved),
            REFUSED: float(not applied),
        }  # fmt: skip

    def check(self, planned: int = REFUSED_UPDATES) -> None:
        """Raise ModelError where so many updates in a row were refused that a run of `planned` of them ends."""
        self.optimizer.check(planned)

    def _by_example(self, logits: Sequence[float], examples: Sequence[Encoded]) -> list[list[float]]:
        flat = iter(logits)
        return [[x for row in one.rows for x in islice(flat, count_of(self.model, row))] for one in examples]

    def state_dict(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file (`reward_model`, `reward_optimizer`) and the counters that go with them."""
        optimizer, counters = self.optimizer.state()
        counted = {"version": self.version, "done": self.done, "round": self._round, "kind": self.model.kind}
        tensors = {"reward_model": self.master_weights(), "reward_optimizer": optimizer}
        return tensors, counters | counted | self.token_budget.state()

    def master_weights(self) -> dict[str, Tensor]:
        """The float32 weights, each tied one once, and persistent buffers."""
        tensors: dict[str, Tensor] = {name: m.detach() for name, m in self.optimizer.master_weights.items()}
        stored = self.model.model.state_dict()
        buffers = {name: b for name, b in self.model.model.named_buffers() if name in stored}
        return tensors | buffers | self.optimizer.buffers

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], counters: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off. Raises RunFolderError where that was of another reward model."""
        own, found = self.master_weights(), tensors["reward_model"]
        for name in sorted(own.keys() | found.keys()):
            ours, theirs = (list(side[name].shape) if name in side else "absent" for side in (own, found))
            if ours != theirs or counters["kind"] != self.model.kind:
                raise RunFolderError(
                    f"The checkpoint is of another reward model: kind {counters['kind']}, its {name} is {theirs}; this "
                    f"one is of kind {self.model.kind}, and its {name} is {ours}."
                )
        self.optimizer.load(found, tensors.get("reward_optimizer", {}), counters)
        self.token_budget.load(counters)
        with torch.no_grad():
            for name, buffer in [*self.model.model.named_buffers(), *self.optimizer.buffers.items()]:
                if name in found:
                    buffer.copy_(found[name])
        self.model.version, self.done, self._round = counters["version"], counters["done"], counters["round"]


def micro_batches(examples: Sequence[Encoded], budget: int) -> Iterator[list[Encoded]]:
    """Examples of like length together, each pass of at most `budget` tokens with its padding, at least one example."""
    part: list[Encoded] = []
    rows = 0
    for example in sorted(examples, key=lambda one: max(len(row.token_ids) for row in one.rows), reverse=True):
        longest = max(len(row.token_ids) for row in (part or [example])[0].rows)
        if part and (rows + len(example.rows)) * longest > budget:
            yield part
            part, rows = [], 0
        part.append(example)
        rows += len(example.rows)
    if part:
        yield part


def _labels(example: Example) -> tuple[float | None, ...]:
    if isinstance(example, Preferred):
        return ()
    return (example.label,) if isinstance(example, Graded) else example.labels


def _losses(logits_K: Tensor, examples: Sequence[Encoded]) -> Tensor:
    """The losses of examples from the logits of their rows, in any order: of labels first, then of pairs."""
    places: list[int] = []
    labels: list[float] = []
    chosen: list[int] = []
    start = 0
    for one in examples:
        if not one.labels:
            chosen.append(start)
            start += 2
            continue
        known = [(start + i, label) for i, label in enumerate(one.labels) if label is not None]
        places += [place for place, _ in known]
        labels += [label for _, label in known]
        start += len(one.labels)
    chosen_K = torch.tensor(chosen, dtype=torch.long, device=logits_K.device)
    pairs = preference_losses(logits_K[chosen_K], logits_K[chosen_K + 1])
    return torch.cat([label_losses(logits_K[places], logits_K.new_tensor(labels)), pairs])


def _quality(kind: str, examples: Sequence[Encoded], logits: Sequence[Sequence[float]]) -> Metrics:
    """The metrics of examples, all of one format."""
    if kind == "process":
        return step_metrics([[sigmoid(x) for x in of_output] for of_output in logits], [one.labels for one in examples])
    if not examples[0].labels:
        return preference_metrics([x for x, _ in logits], [y for _, y in logits])
    return label_metrics([sigmoid(x) for [x] in logits], [one.labels[0] or 0.0 for one in examples])


def _fingerprint(examples: Sequence[Encoded]) -> str:
    """Names examples by their tokens and labels, in order."""
    digest = blake2b(digest_size=8)
    for example in examples:
        digest.update(json.dumps(example).encode())
    return digest.hexdigest()
