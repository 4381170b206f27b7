"""One frozen type per stage, from a prompt to a scored group. Plain lists and tuples: they pickle, print, compare and
go into JSON. Tensors begin in `learn/pack.py`.

Dimensions in names: `N` tokens of a stream, `T` output tokens, `S` outputs, `Q` prompts, `G` outputs of one prompt,
`V` vocabulary, `D` hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Message = dict[str, Any]
Finish = Literal["stop", "length", "aborted"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, ready to be sampled from.

    `prompt_id` names the row of its data set (`"17"`); `content` is what the row held, a string or a list of
    messages; `token_ids` is its encoding, made once; `row` holds the data set's other columns. `template_options` are
    the row's own for the chat template, such as its tools.
    """

    prompt_id: str
    content: str | list[Message]
    token_ids: tuple[int, ...]
    row: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_conversation(self) -> bool:
        """Whether `content` is a list of messages."""
        return not isinstance(self.content, str)

    @property
    def asked(self) -> str:
        """What is asked, for people: the text, or that of the last message."""
        if isinstance(self.content, str):
            return self.content
        return str(self.content[-1].get("content") or "") if self.content else ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How outputs are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    `stop` strings end an output when they appear in its text; they stay part of the output.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and outputs of it that requests go on from: computed once for all requests that name its `uid`."""

    uid: str
    prompt: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]


class Branch(NamedTuple):
    """A place in a tree: behind the first `cut` tokens (at least one) of output number `output`."""

    tree: Tree
    output: int
    cut: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The way there: the prompt, and the output so far."""
        return (*self.tree.prompt, *self.tree.outputs[self.output][: self.cut])


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued `n` times. Output `i` draws with seed `seed + i`.

    `branch` says which tree `token_ids` are a way through, where they are: an engine may then compute what they have in
    common with other requests once. It changes no draw.
    """

    uid: str
    token_ids: tuple[int, ...]
    n: int
    sampling: Sampling
    seed: int
    branch: Branch | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One output as it was sampled. The end token, where there is one, is the last of `token_ids`.

    `sampled_logprobs` has one entry per token, under the distribution that was sampled (temperature included).
    `policy_versions` are run lengths `(version, number of tokens)`: weights may change under way.
    """

    token_ids: tuple[int, ...]
    text: str
    sampled_logprobs: tuple[float, ...]
    finish: Finish
    policy_versions: tuple[tuple[int, int], ...] = ()


class Sampled(NamedTuple):
    """An engine's answer: output number `output` of request `uid`."""

    uid: str
    output: int
    completion: Completion


class GroupKey(NamedTuple):
    """The identity of a group. Two equal questions in one step are two groups: their slots differ."""

    step: int
    slot: int
    prompt_id: str


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its `G` outputs."""

    key: GroupKey
    prompt: Prompt
    completions: tuple[Completion, ...]


class Step(NamedTuple):
    """A step and its reward: it covers the output's tokens before `end` (exclusive), after the previous end.

    `reward` None means "not scored". The texts of an output's steps, laid end to end, are its text.
    """

    end: int
    reward: float | None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """What an output earned. `reward` None means "not scored", which is not a reward of 0.

    `parts` holds each reward function's own value, by its name.
    """

    reward: float | None
    steps: tuple[Step, ...] = ()
    parts: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group and one score per output, in order."""

    group: Group
    scores: tuple[Score, ...]

    @property
    def rewards(self) -> list[float | None]:
        """One reward per output; None where it was not scored."""
        return [score.reward for score in self.scores]

    @property
    def steps(self) -> list[list[tuple[int, float | None]]]:
        """`(end, reward)` of each output's steps; none where steps are not scored."""
        return [[(step.end, step.reward) for step in score.steps] for score in self.scores]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each output."""
        return [len(completion.token_ids) for completion in self.group.completions]


Scored = Sequence[ScoredGroup]
