"""Lift functions to rewards: those of a file or module run in a worker process, callables given from Python in-process.

How a function is called follows from its signature alone. A function that names `prompts`, `completions`,
`completion_ids` or `log_extra` is called once, by keyword only, with lists that have one entry per output: these,
`trainer_state`, `log_metric`, and the data set's columns (TRL's convention); it returns a list of numbers. Else, one
that names `prompt` or `completion` is called once per output with single values of these and of the columns it names,
and returns a number; `completion` is then the text, also in conversations. Else, one whose first two parameters are
positional, have no default, and come without `**kwargs`, such as `lambda question, reply: ...`, is called once per
output with prompt and completion by position, and with what else it names by keyword. What remains (`**kwargs` alone)
is called with lists. Without `**kwargs` a function is given only what it names. Any of them may be `async def`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from groupwise.errors import RewardError
from groupwise.rewards.arguments import alone, build_request
from groupwise.rewards.base import Reward, RewardContext, Scope, Values
from groupwise.rewards.calling import LoadError, Message, Number
from groupwise.rewards.checks import check_count, check_values, show_output
from groupwise.rewards.workers import CallFailed, InProcess, Runner, Worker
from groupwise.types import Group

BUILTINS = {"arithmetic": "groupwise.rewards.arithmetic:score"}
DEAD_STEPS = 3  # so many steps in a row without a single value are no accident


@dataclass
class Reply:
    """What calls over consecutive outputs gave: one value per output, and why some have none, by their index."""

    values: list[Number] = field(default_factory=list)
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


class FunctionReward:
    """A user's function as a reward.

    One call over all outputs may take `timeout` seconds. When it fails, each output is tried once alone for
    `output_timeout` seconds; an output whose own call raises, takes too long or ends the process is not scored.
    Per step, `rewards/<name>/failed` counts such outputs, `rewards/<name>/timeouts` the calls that took too long (of
    the batch or of one output), and `rewards/<name>/worker_restarts` the processes that were started anew.
    """

    def __init__(self, runner: Runner, name: str, *, timeout: float, output_timeout: float) -> None:
        self.name = name
        # A function over lists may compare siblings; more than the group none written for TRL can rely on.
        self.scope: Scope = "output" if runner.signature.per_output else "group"
        self.own_process = runner.own_process
        self._runner = runner
        self._timeout = timeout
        self._output_timeout = output_timeout
        self._told: set[str] = set()
        self._dead_steps = 0

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Values:
        """One value per output of each group, None where it was not scored. Raises RewardError on unusable values."""
        outputs = [(group, index) for group in groups for index in range(len(group.completions))]
        request = build_request(self._runner.signature, groups, context)
        timeouts, restarts = self._runner.timeouts, self._runner.restarts
        whole = Reply()
        for reply in self._replies(request, context) if outputs else ():
            for index, failure in reply.failures.items():
                where = show_output(*outputs[len(whole.values) + index])
                self._tell(failure, f"on an output, which is not scored\n{where}", context)
            whole.append(reply)
        self._count_dead_steps(0 < len(outputs) == len(whole.failures), context)
        context.metrics |= {name: fmean(logged) for name, logged in whole.metrics.items()}
        context.extras |= whole.extras
        context.metrics[f"rewards/{self.name}/failed"] = float(len(whole.failures))
        context.metrics[f"rewards/{self.name}/timeouts"] = float(self._runner.timeouts - timeouts)
        if self.own_process:
            context.metrics[f"rewards/{self.name}/worker_restarts"] = float(self._runner.restarts - restarts)
        return check_values(self.name, groups, whole.values)

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
                f"reward function `{self.name}` returned {answer['unusable']}; "
                f"it must return a list of {count} numbers, one per output"
            )
        check_count(self.name, len(answer["values"]), count)
        for column, entries in answer["extras"].items():
            check_count(self.name, len(entries), count, of=f"entries through log_extra({column!r})")
        failures = {index: CallFailed("error", detail) for index, detail in answer["failures"].items()}
        return Reply(answer["values"], failures, answer["metrics"], answer["extras"])

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
            f"reward function `{self.name}` failed {where}\n{failure.detail}{advice}\n"
            f"Further failures of this kind are only counted, in rewards/{self.name}/failed."
        )

    def _count_dead_steps(self, dead: bool, context: RewardContext) -> None:
        self._dead_steps = self._dead_steps + 1 if dead else 0
        if self._dead_steps >= DEAD_STEPS:
            context.warn(
                f"reward function `{self.name}` has failed on every output for {self._dead_steps} steps in a row: "
                "nothing is learned from it"
            )


def load_reward(
    spec: str | Callable[..., Any] | Reward,
    *,
    timeout: float = 60.0,
    output_timeout: float = 10.0,
    log: Path | None = None,
) -> Reward:
    """The reward that `spec` names, loaded and ready.

    `file.py:name` and `package.module:name` run in a worker process, whose prints are appended to `log` (default: a
    temporary file); `builtin:arithmetic` and callables run in this process; a Reward is returned as it is. Limits in
    seconds: `timeout` for a step's outputs together, `output_timeout` for one alone. Raises RewardError where it
    cannot be loaded.
    """
    if not isinstance(spec, str) and isinstance(spec, Reward):
        return spec
    runner, name = _runner(spec, log)
    return FunctionReward(runner, name or runner.signature.name, timeout=timeout, output_timeout=output_timeout)


def _runner(spec: str | Callable[..., Any], log: Path | None) -> tuple[Runner, str]:
    """What runs the function, and the name of its metrics where that is not the function's own."""
    if isinstance(spec, str) and not spec.startswith("builtin:"):
        return Worker(spec, log=log), ""
    name = ""
    if isinstance(spec, str):
        name = spec.removeprefix("builtin:")
        spec = _builtin(name)
    try:
        return InProcess(spec), name
    except LoadError as error:
        raise RewardError(f"reward function `{spec!r}` cannot be used: {error}") from error


def _builtin(name: str) -> Callable[..., Any]:
    if name not in BUILTINS:
        nearest = difflib.get_close_matches(name, BUILTINS, n=1, cutoff=0.0)
        raise RewardError(f"there is no built-in reward `builtin:{name}`; the nearest is `builtin:{nearest[0]}`")
    module, _, function = BUILTINS[name].partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
