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
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from groupwise.errors import RewardError
from groupwise.rewards.base import Reward, RewardContext, Values
from groupwise.rewards.checks import check_values
from groupwise.rewards.functions.calling import LoadError
from groupwise.rewards.functions.calls import FunctionCalls
from groupwise.rewards.functions.workers import InProcess, Runner, Worker
from groupwise.types import Group

BUILTINS = {"arithmetic": "groupwise.demo.reward:score", "gsm8k": "groupwise.rewards.gsm8k:score"}
STEPWISE_BUILTINS = {"arithmetic": "groupwise.demo.reward:score_steps"}


class FunctionReward(FunctionCalls):
    """A user's function as a reward: see `FunctionCalls`."""

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Values:
        """One value per output of each group, None where it was not scored. Raises RewardError on unusable values."""
        return check_values(self.name, groups, self.values(groups, context))


def load_reward(
    spec: str | Callable[..., Any] | Reward,
    *,
    timeout: float = 60.0,
    output_timeout: float = 10.0,
    log: Path | None = None,
) -> Reward:
    """The reward that `spec` names, loaded and ready.

    `file.py:name` and `package.module:name` run in a worker process, whose prints are appended to `log` (default: a
    temporary file); `builtin:...` and callables run in the thread that calls; a Reward is returned as it is. Limits in
    seconds: `timeout` for a step's outputs together, `output_timeout` for one alone. Raises RewardError where it cannot
    be loaded.
    """
    if not isinstance(spec, str) and _is_reward(spec):
        return spec
    runner, name = _runner(spec, log)
    return FunctionReward(runner, name or runner.signature.name, timeout=timeout, output_timeout=output_timeout)


def _is_reward(given: Callable[..., Any] | Reward) -> TypeGuard[Reward]:
    """Whether this is a Reward and no function. Raises RewardError for what is called as one and is none."""
    if isinstance(given, Reward):
        return True
    try:
        called = tuple(inspect.signature(given).parameters)
    except (TypeError, ValueError):
        return False  # it is told of where functions are
    if called[:2] != ("groups", "context"):
        return False
    raise RewardError(
        f"{given!r} is called with (groups, context), as a Reward is, and lacks "
        f"{' and '.join(f'`{name}`' for name in ('name', 'close') if not hasattr(given, name))}. See `Reward` in "
        "groupwise.rewards.base; a function takes `prompt, completion`, or lists: `completions`."
    )


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
