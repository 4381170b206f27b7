"""A user's function, called on the outputs of a step: all together and, where that fails, each by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from groupwise.averages import mean
from groupwise.errors import RewardError
from groupwise.rewards.base import RewardContext
from groupwise.rewards.checks import check_count, show_output
from groupwise.rewards.functions.arguments import alone, build_request
from groupwise.rewards.functions.calling import Message
from groupwise.rewards.functions.workers import CallFailed, Runner
from groupwise.seeds import stable_hash
from groupwise.types import Group

UNTRIED = "it was not tried"
"""Begins why an output has no value that was left out after too many costly ones."""
MOST_COSTLY = 4
"""So many outputs in a row that each took too long alone, or ended the process, speak for all that follow."""


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
    `output_timeout` seconds; an output whose own call raises, takes too long or ends the process has no value. A
    function that hangs is not waited for again and again: after a call that took too long, outputs are tried alone
    from the start, until a step goes without one; and after `MOST_COSTLY` in a row a step tries a single output. Per
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
        self._hung = False
        self._costly = 0

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
                fault = f"{where}\n{failure.detail}"
                tried = sum(UNTRIED not in one for one in context.faults)  # what says why comes first
                context.faults.insert(len(context.faults) if UNTRIED in failure.detail else tried, fault)
            whole.append(reply)
        own = f"{self.place}/{self.name}"
        context.metrics |= {name: mean(logged) for name, logged in whole.metrics.items()}
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
        together: CallFailed | None = None
        if not self._hung:
            try:
                yield self._call(request, self._timeout, context)
                return
            except CallFailed as error:
                together = error
        replies = self._alone(request, context, together)
        yield from replies
        if together and not any(reply.failures for reply in replies):
            self._tell(together, f"on {request['count']} outputs together, yet on none of them alone", context)

    def _alone(self, request: Message, context: RewardContext, together: CallFailed | None) -> list[Reply]:
        """One reply for each output; those after too many that hang are not tried."""
        order = list(range(request["count"]))
        if together is None or together.kind != "error":
            # So that the outputs of one bad prompt do not come one after the other.
            order.sort(key=lambda index: stable_hash("alone", index))
        self._hung = together is not None and together.kind == "timeout"
        replies: dict[int, Reply] = {}
        for index in order:
            if replies and self._costly >= MOST_COSTLY:
                why = f"{UNTRIED}: the {self._costly} calls before it all took too long, or ended the process"
                replies[index] = Reply([None], {0: CallFailed("timeout", why)})
                continue
            replies[index] = reply = self._tried(alone(request, index), context)
            kinds = {failure.kind for failure in reply.failures.values()}
            self._hung = self._hung or "timeout" in kinds
            self._costly = self._costly + 1 if kinds & {"timeout", "died"} else 0
        return [replies[index] for index in range(request["count"])]

    def _tried(self, request: Message, context: RewardContext) -> Reply:
        try:
            return self._call(request, self._output_timeout, context)
        except CallFailed as error:
            return Reply([None], {0: error})

    def _call(self, request: Message, limit: float, context: RewardContext) -> Reply:
        """One call. Raises CallFailed, or RewardError where the answer has the wrong shape."""
        count = request["count"]

        def late(stack: str) -> None:
            self._tell_late(f"more than {limit:g} s on {count} outputs", stack, context)

        answer = self._runner.call(request, limit, late)
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
        context.warn(
            f"{self.kind} `{self.name}` failed {where}\n{failure.detail}{advice}\n"
            f"Further failures of this kind are only counted, in {self.place}/{self.name}/failed."
        )

    def _tell_late(self, took: str, stack: str, context: RewardContext) -> None:
        """Say once where a call is that cannot be stopped."""
        if "late" not in self._told:
            self._told.add("late")
            context.warn(
                f"{self.kind} `{self.name}` has taken {took}. It runs in this process, which waits for it; given as "
                f"`file.py:name` it runs in one that is stopped. It is at\n{stack}\n"
                f"Further such calls are only counted, in {self.place}/{self.name}/timeouts."
            )
