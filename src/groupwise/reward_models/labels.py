"""Where the labels of a reward model's training set come from: never from the model itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

from groupwise.data.messages import template_columns
from groupwise.data.rows import read_rows
from groupwise.disk import fixed
from groupwise.reward_models.monte_carlo import MonteCarlo, read_by
from groupwise.tokenizer.codec import Codec
from groupwise.types import Group, Scored

Row = dict[str, Any]
"""An example as reward models learn from it (see `groupwise.reward_models.examples`), and where it comes from."""


class LabelSource(Protocol):
    """Labels the outputs of a round. `reads_outputs`: it needs them, and has no examples of its own. `compares`:
    whether its examples are pairs; None where that shows only when it is asked."""

    name: str
    reads_outputs: bool
    compares: bool | None

    def __call__(self, verified: Scored) -> list[Row]:
        """The examples of these groups, whose scores are the verifier's; those without any label are left out.

        What is of a group says of which outputs, by their numbers in `outputs`.
        """


class VerifierLabels:
    """Outputs: right where the verifier gives at least `threshold`."""

    name, reads_outputs = "verifier", True
    compares: bool | None = False

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, verified: Scored) -> list[Row]:
        """See `LabelSource`. An output that the verifier did not score has no label."""
        rows: list[Row] = []
        for one in verified:
            for i, (output, reward) in enumerate(zip(one.group.completions, one.rewards, strict=True)):
                if reward is not None:
                    rows.append({
                        "prompt": one.group.prompt.content, "completion": output.text, "finish": output.finish,
                        "label": float(reward >= self.threshold), **_where(one.group, i),
                        **template_columns(one.group.prompt),
                    })  # fmt: skip
        return rows


class VerifierPairs:
    """Pairs of outputs to one prompt, of which the verifier calls one right and the other wrong.

    Each output of a group is in one pair, and those of the fewer kind in as many as it takes. Advantages compare the
    outputs of a group: what tells prompts apart, which labels teach too, is nothing that a policy learns from.
    """

    name, reads_outputs = "pairs", True
    compares: bool | None = True

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, verified: Scored) -> list[Row]:
        """See `LabelSource`. A group that is all right, or all wrong, makes no pair."""
        rows: list[Row] = []
        for one in verified:
            known = [(i, r >= self.threshold) for i, r in enumerate(one.rewards) if r is not None]
            right, wrong = ([i for i, is_right in known if is_right == kind] for kind in (True, False))
            for n in range(max(len(right), len(wrong)) if right and wrong else 0):
                pair = right[n % len(right)], wrong[n % len(wrong)]
                chosen, rejected = (one.group.completions[i] for i in pair)
                rows.append({
                    "prompt": one.group.prompt.content, "chosen": chosen.text, "rejected": rejected.text,
                    "chosen_finish": chosen.finish, "rejected_finish": rejected.finish, **_where(one.group, *pair),
                    **template_columns(one.group.prompt),
                })  # fmt: skip
        return rows


Opener = Callable[[ExitStack], tuple[MonteCarlo, Codec | None]]
"""Opens what labels by continuations, until the stack is closed; with a codec where its tokens are not the policy's."""


class MonteCarloLabels:
    """Steps: right where continuations of them are, drawn by a completer that is in memory only while it draws."""

    name, reads_outputs = "monte_carlo", True
    compares: bool | None = False

    def __init__(self, opener: Opener) -> None:
        self._open = opener

    def __call__(self, verified: Scored) -> list[Row]:
        """See `LabelSource`."""
        with ExitStack() as closing:
            labeller, codec = self._open(closing)
            found = labeller.label(verified if codec is None else _read_by(codec, verified))
            rows = [one.row(labeller.soft) | {"outputs": [one.output]} for one in found]
        return [row for row in rows if any(label is not None for label in row["labels"])]


class FileLabels:
    """Examples of a file, folder or hub data set, read anew each round: it may grow during a run."""

    reads_outputs = False
    compares: bool | None = None

    def __init__(self, path: str) -> None:
        self.name = path
        self._path = fixed(path)

    def __call__(self, verified: Scored) -> list[Row]:
        """See `LabelSource`. Raises DataError where it cannot be read."""
        return [dict(row) for row in read_rows(self._path)]


def _where(group: Group, *outputs: int) -> Row:
    key = group.key
    return {"prompt_id": key.prompt_id, "step": key.step, "slot": key.slot, "outputs": list(outputs)}


def _read_by(codec: Codec, verified: Scored) -> Scored:
    """Groups as another model's tokenizer reads their texts."""
    return [replace(one, group=_group_read_by(codec, one.group)) for one in verified]


def _group_read_by(codec: Codec, group: Group) -> Group:
    prompt = replace(group.prompt, token_ids=codec.encode_prompt(group.prompt.content, group.prompt.template_options))
    return replace(group, prompt=prompt, completions=tuple(read_by(codec, c.text, c.finish) for c in group.completions))
