"""Lift functions to rewards: those of a file or module run in a worker process, callables given from Python in-process.

How a function is called follows from its signature alone. A function that names `prompts`, `completions`,
`completion_ids` or `log_extra` is called once, by keyword only, with lists that have one entry per output: these,
`trainer_state`, `log_metric`, and the data set's columns (TRL's convention); it returns a list of numbers. Else, one
that names `prompt` or `completion` is called once per output with single values of these and of the columns it names,
and returns a number; `completion` is then the text, also in conversations. Else, one whose first two parameters are
positional, have no default, and come without `**kwargs`, such as `lambda question, reply: ...`, is called once per
output with prompt and completion by position, and with what else it names by keyword. What remains (`**kwargs` alone)
is called with lists. Without `**kwargs` a function is given only what it names. Any of them may be `async def`.

A function that scores steps is handed `steps` too: the texts of each output's steps, a list of lists or, where it names
`prompt` or `completion`, one list. It returns a list of numbers per output, None for a step or a whole output that it
does not score. It names what it takes: nothing is handed to it by position."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from groupwise.errors import RewardError
from groupwise.rewards.arguments import alone, build_request
from groupwise.rewards.base import Reward, RewardContext, Scope, Values
from groupwise.rewards.calling import LoadError, Message
from groupwise.rewards.checks import check_count, check_values, show_output
from groupwise.rewards.workers import CallFailed, InProcess, Runner, Worker
from groupwise.types import Group

if TYPE_CHECKING:
    from groupwise.models.reward_model import Kind, RewardModel

BUILTINS = {"arithmetic": "groupwise.rewards.arithmetic:score"}
MODEL = "model:"
"""Begins the name of a reward model: `model:DIR`, or `model:ID` of the hub."""
STEPWISE_BUILTINS = {"arithmetic": "groupwise.rewards.arithmetic:score_steps"}
DEAD_STEPS = 3  # so many steps in a row without a single value are no accident


@dataclass(frozen=True)
class ModelOptions:
    """How reward models are opened: where they compute, in what, `tag, right, wrong` of causal ones, and what day their
    templates are told it is."""

    device: str = "auto"
    dtype: str = "auto"
    step_tags: Sequence[str] | None = None
    trust_remote_code: bool = False
    date: str | None = None


@dataclass
class Reply:
    """What calls over consecutive outputs gave: one value per output (a number, or a list of them where steps are
    scored), and why some have none, by their index."""

    values: list[Any] = field(default_factory=list)
    failures: dict[int, CallFailed] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)

    def append(self, other: Reply) -> None:
        """Add a reply for the outputs that follow; a column of extras that it lacks has None for them."""
        before = len(self.values)
        self.values += other.values
        self.failures |= {before + index: failure for index, failure in other.failures.items()}
        for name, logged in other.metrics.items():
            self.metrics.setdefault(name, []).extend(logged)
        for column in dict.fromkeys([*self.extras, *other.extras]):
            entries = self.extras.setdefault(column, [None] * before)
            entries += other.extras.get(column, [None] * len(other.values))


class FunctionCalls:
    """A user's function, called on the outputs of a step.

    One call over all outputs may take `timeout` seconds. When it fails, each output is tried once alone for
    `output_timeout` seconds; an output whose own call raises, takes too long or ends the process has no value. Per
    step, `<place>/<name>/failed` counts such outputs, `.../timeouts` the calls that took too long (of the batch or of
    one output), and `.../worker_restarts` the processes that were started anew. `kind` is what messages call it.
    """

    place, kind = "rewards", "reward function"

    def __init__(
        self, runner: Runner, name: str, *, timeout: float, output_timeout: float, place: str = "", kind: str = ""
    ) -> None:
        self.name = name
        self.place, self.kind = place or self.place, kind or self.kind
        self.own_process = runner.own_process
        self._runner = runner
        self._timeout = timeout
        self._output_timeout = output_timeout
        self._told: set[str] = set()
        self._dead_steps = 0

    def takes(self, name: str) -> bool:
        """Whether a call hands this to the function."""
        return self._runner.signature.takes(name)

    def values(
        self, groups: Sequence[Group], context: RewardContext, steps: Sequence[Sequence[str]] | None = None
    ) -> list[Any]:
        """What the function returns, one entry per output in the order of the groups, None where it gave none.

        `steps` holds the texts of each output's steps, where the function is to score them. Raises RewardError where
        the answer has the wrong shape.
        """
        outputs = [(group, index) for group in groups for index in range(len(group.completions))]
        request = build_request(self._runner.signature, groups, context, steps)
        timeouts, restarts = self._runner.timeouts, self._runner.restarts
        whole = Reply()
        for reply in self._replies(request, context) if outputs else ():
            for index, failure in reply.failures.items():
                where = show_output(*outputs[len(whole.values) + index])
                self._tell(failure, f"on an output, which is not scored\n{where}", context)
            whole.append(reply)
        self._count_dead_steps(0 < len(outputs) == len(whole.failures), context)
        own = f"{self.place}/{self.name}"
        context.metrics |= {name: fmean(logged) for name, logged in whole.metrics.items()}
        context.extras |= whole.extras
        context.metrics[f"{own}/failed"] = float(len(whole.failures))
        context.metrics[f"{own}/timeouts"] = float(self._runner.timeouts - timeouts)
        if self.own_process:
            context.metrics[f"{own}/worker_restarts"] = float(self._runner.restarts - restarts)
        return whole.values

    def close(self) -> None:
        """End the worker process, if there is one."""
        self._runner.close()

    def _replies(self, request: Message, context: RewardContext) -> Iterator[Reply]:
        """One reply for all outputs or, when that call fails, one for each output alone."""
        try:
            yield self._call(request, self._timeout)
            return
        except CallFailed as error:
            batch_failure = error
        failed = False
        for index in range(request["count"]):
            try:
                reply = self._call(alone(request, index), self._output_timeout)
            except CallFailed as error:
                reply = Reply([None], {0: error})
            failed = failed or bool(reply.failures)
            yield reply
        if not failed:
            self._tell(batch_failure, f"on {request['count']} outputs together, yet on none of them alone", context)

    def _call(self, request: Message, limit: float) -> Reply:
        """One call. Raises CallFailed, or RewardError where the answer has the wrong shape."""
        answer, count = self._runner.call(request, limit), request["count"]
        if "unusable" in answer:
            raise RewardError(
                f"{self.kind} `{self.name}` returned {answer['unusable']}; "
                f"it must return a list of {count} {self._entries}, one per output"
            )
        check_count(self.name, len(answer["values"]), count, kind=self.kind)
        for column, entries in answer["extras"].items():
            of = f"entries through log_extra({column!r})"
            check_count(self.name, len(entries), count, of=of, kind=self.kind)
        failures = {index: CallFailed("error", detail) for index, detail in answer["failures"].items()}
        return Reply(answer["values"], failures, answer["metrics"], answer["extras"])

    @property
    def _entries(self) -> str:
        return "lists" if self._runner.signature.stepwise else "numbers"

    def _tell(self, failure: CallFailed, where: str, context: RewardContext) -> None:
        """Show the first failure of each kind, and what would do; the metrics count the others."""
        if failure.kind in self._told:
            return
        self._told.add(failure.kind)
        advice = ""
        if failure.kind == "timeout":
            advice = "\nIf it only needs longer, raise `timeout` or `output_timeout` under [reward]."
            if not self.own_process:
                advice += (
                    "\nIt runs in this process, where a function that is not async cannot be stopped: its thread goes "
                    "on. Given as `file.py:name` it runs in a process that can be killed."
                )
        context.warn(
            f"{self.kind} `{self.name}` failed {where}\n{failure.detail}{advice}\n"
            f"Further failures of this kind are only counted, in {self.place}/{self.name}/failed."
        )

    def _count_dead_steps(self, dead: bool, context: RewardContext) -> None:
        self._dead_steps = self._dead_steps + 1 if dead else 0
        if self._dead_steps >= DEAD_STEPS:
            context.warn(
                f"{self.kind} `{self.name}` has failed on every output for {self._dead_steps} steps in a row: "
                "nothing is learned from it"
            )


class FunctionReward(FunctionCalls):
    """A user's function as a reward: see `FunctionCalls`."""

    def __init__(self, runner: Runner, name: str, *, timeout: float, output_timeout: float) -> None:
        super().__init__(runner, name, timeout=timeout, output_timeout=output_timeout)
        # A function over lists may compare siblings; more than the group none written for TRL can rely on.
        self.scope: Scope = "output" if runner.signature.per_output else "group"

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Values:
        """One value per output of each group, None where it was not scored. Raises RewardError on unusable values."""
        return check_values(self.name, groups, self.values(groups, context))


def load_reward(
    spec: str | Callable[..., Any] | Reward,
    *,
    timeout: float = 60.0,
    output_timeout: float = 10.0,
    log: Path | None = None,
    models: ModelOptions = ModelOptions(),
) -> Reward:
    """The reward that `spec` names, loaded and ready.

    `file.py:name` and `package.module:name` run in a worker process, whose prints are appended to `log` (default: a
    temporary file); `builtin:arithmetic` and callables run in this process; `model:DIR` is a reward model, opened by
    `models`; a Reward is returned as it is. Limits in seconds, which hold for functions: `timeout` for a step's outputs
    together, `output_timeout` for one alone. Raises RewardError where it cannot be loaded, ModelError for a model.
    """
    if not isinstance(spec, str) and isinstance(spec, Reward):
        return spec
    if isinstance(spec, str) and spec.startswith(MODEL):
        from groupwise.rewards.model import ModelReward

        return ModelReward(open_reward_model(spec, "outcome", models))
    runner, name = _runner(spec, log)
    return FunctionReward(runner, name or runner.signature.name, timeout=timeout, output_timeout=output_timeout)


def open_reward_model(spec: str, kind: Kind, options: ModelOptions) -> RewardModel:
    """The reward model that `model:DIR` names. Raises ModelError where it cannot be used."""
    from groupwise.models.judging import Tags
    from groupwise.models.load import choose_device, choose_dtype
    from groupwise.models.reward_model import Source, load_reward_model

    source = Source(spec.removeprefix(MODEL), trust_remote_code=options.trust_remote_code, date=options.date)
    dtype = choose_dtype(options.dtype, choose_device(options.device))
    tags = Tags(*options.step_tags) if options.step_tags else None
    return load_reward_model(source, kind, device=options.device, dtype=dtype, tags=tags)


def load_stepwise(
    spec: str | Callable[..., Any], *, place: str, kind: str, timeout: float = 60.0, output_timeout: float = 10.0,
    log: Path | None = None,
) -> FunctionCalls:  # fmt: skip
    """A function that returns a list per output, named and run as in `load_reward`: it scores steps, or finds them.

    `place` is where its metrics go, `kind` what messages call it. Raises RewardError where it cannot be loaded.
    """
    runner, name = _runner(spec, log, kind)
    name = name or runner.signature.name
    return FunctionCalls(runner, name, timeout=timeout, output_timeout=output_timeout, place=place, kind=kind)


def _runner(spec: str | Callable[..., Any], log: Path | None, kind: str = "") -> tuple[Runner, str]:
    """What runs the function, and the name of its metrics where that is not the function's own.

    `kind` is given for functions that return a list per output.
    """
    if isinstance(spec, str) and not spec.startswith("builtin:"):
        return Worker(spec, log=log, kind=kind or FunctionCalls.kind, stepwise=bool(kind)), ""
    name = ""
    if isinstance(spec, str):
        name = spec.removeprefix("builtin:")
        spec = _builtin(name, STEPWISE_BUILTINS if kind else BUILTINS)
    try:
        return InProcess(spec, stepwise=bool(kind)), name
    except LoadError as error:
        raise RewardError(f"{kind or FunctionCalls.kind} `{spec!r}` cannot be used: {error}") from error


def _builtin(name: str, known: Mapping[str, str]) -> Callable[..., Any]:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise RewardError(f"there is no built-in reward `builtin:{name}`; the nearest is `builtin:{nearest[0]}`")
    module, _, function = known[name].partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
