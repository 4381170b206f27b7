"""The native engine's shared decoding: a prompt is computed once and held once, however many outputs continue it.

So are outputs that other requests go on from (see `Tree`): prompt, output so far, continuation are three levels.

Live rows are always the first `R` of their store and live prompts the first `Q`: what finishes is overwritten by the
last one, so views suffice and nothing that has ended costs anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from groupwise.engines.native.graphs import Graphs, Live
from groupwise.engines.native.stores import Outputs, Shared, SharedLevel, Step, Store
from groupwise.models.attention import ForestAttention
from groupwise.models.layout import Forest, build_forest
from groupwise.models.policy import Policy
from groupwise.models.tiles import Options
from groupwise.types import Branch

_PREFILL_TOKENS = 16384
"""Most prompt tokens of one forward pass: more would take memory and no less time. A tree is never divided."""
_FIRST_LENGTH = 64
"""Tokens that an output has room for at first; what grows longer gets twice as much, up to the longest limit."""

Branches = Mapping[str, Branch]
"""Requests that go on from a tree, by uid."""


class _Unit(NamedTuple):
    """What is computed in one pass: `segments` (name, tokens), a prompt and the outputs that hang from it, and `starts`
    (uid, segment, cut), where requests go on from."""

    segments: list[tuple[Hashable, Sequence[int]]]
    starts: list[tuple[str, int, int]]

    @property
    def tokens(self) -> int:
        """Of all segments."""
        return sum(len(ids) for _, ids in self.segments)


class _Start(NamedTuple):
    """Where a request's rows begin: behind a prompt, or behind `cut` tokens of an output of it, and the hidden state
    of the last token before."""

    prompt: Hashable
    prompt_length: int
    trunk: Hashable | None
    cut: int
    hidden_D: Tensor

    @property
    def entries(self) -> tuple[Hashable, ...]:
        """What has to be kept for it: the prompt, and the output if any."""
        return (self.prompt,) if self.trunk is None else (self.prompt, self.trunk)


class _Prefill:
    """Attention over a stream of segments that also fills stores: `entries` are a store, the place of the first entry
    in it, and which segments it is to hold."""

    def __init__(self, forest: Forest, entries: Sequence[tuple[Store, int, Sequence[int]]]) -> None:
        self.attention = ForestAttention(forest)
        length = torch.tensor(forest.lengths)
        start = length.cumsum(0) - length
        self.targets = []
        for store, first, segments in entries:
            length_Q = length[segments]
            column = torch.arange(max(forest.lengths[i] for i in segments))
            # What stands behind a shorter segment is never looked at; the stream's first token does as well as any.
            index_QL = (start[segments][:, None] + column).where(column < length_Q[:, None], 0)
            rows = slice(first, first + len(segments))
            self.targets.append((store, rows, index_QL.to(forest.position_N.device)))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        for store, rows, index_QL in self.targets:
            for stored, new in zip(store.at(layer, key, value), (key, value), strict=True):
                stored[rows, :, : index_QL.shape[1]] = new[index_QL].transpose(1, 2)
        return self.attention.attend(layer, query, key, value, options)


class SharedDecoder:
    """Decodes rows that go on from entries of shared stores: from prompts, or from outputs of these.

    A prompt is named by the uid of its request; what is of a tree by the tree's uid and the number of the time that it
    was begun, and an output by its own number too.
    """

    refills = True

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.prompts, self.trunks, self.outputs = Shared(), Shared(), Store()
        self.starts: dict[str, _Start] = {}
        self.row_uid: list[str] = []
        self.lengths: list[int] = []
        self._users: Counter[Hashable] = Counter()
        self._times = count()
        self._longest = 0
        self._levels: tuple[SharedLevel, ...] | None = None
        self.graphs = Graphs(policy) if policy.device.type == "cuda" else None

    def begin(self, prompts: Sequence[tuple[str, Sequence[int]]], branches: Branches = MappingProxyType({})) -> None:
        """Compute `(uid, token_ids)` prompts, each once, into the store; of those in `branches` the trees instead.

        A request that comes later has its tree computed again.
        """
        units = [_Unit([(uid, ids)], [(uid, 0, len(ids))]) for uid, ids in prompts if uid not in branches]
        units += _trees(branches, self._times)
        self.prompts.reserve([len(unit.segments[0][1]) for unit in units])
        part: list[_Unit] = []
        for unit in units:
            if part and sum(one.tokens for one in part) + unit.tokens > _PREFILL_TOKENS:
                self._prefill(part)
                part = []
            part.append(unit)
        self._prefill(part)

    def _prefill(self, units: Sequence[_Unit]) -> None:
        device = self.policy.device
        heads = list(accumulate([len(unit.segments) for unit in units], initial=0))
        segments = [segment for unit in units for segment in unit.segments]
        lengths = [len(ids) for _, ids in segments]
        parents = [
            -1 if i == 0 else head for unit, head in zip(units, heads, strict=False) for i in range(len(unit.segments))
        ]
        ahead = list(accumulate(lengths, initial=0))
        starts = [
            (uid, head, head + i, cut) for unit, head in zip(units, heads, strict=False) for uid, i, cut in unit.starts
        ]
        last = [ahead[i] + cut - 1 for _, _, i, cut in starts]
        place = {token: k for k, token in enumerate(sorted(set(last)))}
        forest = build_forest(lengths, parents, device, list(place))
        entries = []
        for shared, hanging in ((self.prompts, False), (self.trunks, True)):
            which = [i for i, parent in enumerate(parents) if (parent >= 0) == hanging]
            if which:
                first = shared.add([segments[i][0] for i in which], [lengths[i] for i in which])
                entries.append((shared.store, first, which))
        ids = torch.tensor([t for _, tokens in segments for t in tokens], device=device)
        hidden = self.policy.hidden(ids, forest.position_N, _Prefill(forest, entries), forest.asked_K)
        found = hidden[torch.tensor([place[token] for token in last], device=device)]
        for (uid, head, i, cut), hidden_D in zip(starts, found, strict=True):
            trunk = (segments[i][0], cut) if i > head else (None, 0)
            self.starts[uid] = _Start(segments[head][0], lengths[head], *trunk, hidden_D)
            self._users.update(self.starts[uid].entries)

    def attach(self, uids: Sequence[str], max_tokens: int) -> Tensor:
        """Add a row per uid behind the live ones; returns the logits of their first tokens `[len(uids), V]`."""
        self.row_uid += uids
        self.lengths += [0] * len(uids)
        self._longest = max(self._longest, max_tokens)
        self.outputs.reserve(len(self.row_uid), min(self._longest, _FIRST_LENGTH))
        self._levels = None
        # One head product per request, not per row.
        place = {uid: i for i, uid in enumerate(dict.fromkeys(uids))}
        logits = self.policy.logits(torch.stack([self.starts[uid].hidden_D for uid in place]))
        return logits[torch.tensor([place[uid] for uid in uids], device=logits.device)]

    def step(self, token_R: Tensor) -> Tensor:
        """Feed every live row its last token; returns the logits of the next ones `[R, V]`."""
        device = token_R.device
        levels = self._looked_at(device)
        length_R = torch.tensor(self.lengths, device=device)
        position_R = self._before_R + length_R
        reach = max(self.lengths) + 1
        ragged = min(self.lengths) + 1 < reach
        if reach > self.outputs.length:
            self.outputs.reserve(len(self.row_uid), min(self._longest, 2 * self.outputs.length))
        self.lengths = [n + 1 for n in self.lengths]
        logits_RV = self._replayed(levels, reach, Live(token_R, length_R, position_R))
        if logits_RV is None:
            layout = Step(levels, Outputs(self.outputs, length_R, reach, ragged))
            logits_RV = self.policy.step(token_R, position_R, layout)
        return logits_RV

    def _looked_at(self, device: torch.device) -> tuple[SharedLevel, ...]:
        """What the live rows share: prompts and, where any of them goes on from an output, outputs."""
        if self._levels is None:
            starts = [self.starts[uid] for uid in self.row_uid]
            levels = [self.prompts.level([s.prompt for s in starts], [s.prompt_length for s in starts], device)]
            if any(s.cut for s in starts):
                levels.append(self.trunks.level([s.trunk for s in starts], [s.cut for s in starts], device))
            self._levels = tuple(levels)
            self._before_R = torch.tensor([s.prompt_length + s.cut for s in starts], device=device)
        return self._levels

    def _replayed(self, levels: tuple[SharedLevel, ...], reach: int, live: Live) -> Tensor | None:
        """The step by a captured graph, where there is one for it."""
        if self.graphs is None or self.graphs.refused:
            return None
        bucket = self.graphs.bucket(levels, reach, self._longest)
        self.outputs.reserve(bucket.rows, bucket.reach)
        for level, (entries, _) in zip(levels, bucket.folds, strict=True):
            level.store.reserve(entries, level.store.length)
        return self.graphs.step(levels, self.outputs, bucket, live)

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows: new row `i` is old row `order[i]`, which stays where it is or comes from the end."""
        moved = [(target, source) for target, source in enumerate(order) if target != source]
        assert all(source >= len(order) for _, source in moved), "a row that is kept would be overwritten"
        if moved:
            self.outputs.move(*zip(*moved, strict=True))
        self.row_uid = [self.row_uid[i] for i in order]
        self.lengths = [self.lengths[i] for i in order]
        self._levels = None

    def end(self, uid: str) -> None:
        """Forget a request, and what only it went on from."""
        for shared, name in zip((self.prompts, self.trunks), self.starts.pop(uid).entries, strict=False):
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                shared.free(name)
        self._levels = None


def _trees(branches: Branches, times: Iterator[int]) -> Iterator[_Unit]:
    """A unit per tree, its outputs as far as a branch needs them."""
    by_tree: dict[str, list[tuple[str, Branch]]] = {}
    for uid, branch in branches.items():
        by_tree.setdefault(branch.tree.uid, []).append((uid, branch))
    for found in by_tree.values():
        tree = found[0][1].tree
        name = (tree.uid, next(times))
        longest: dict[int, int] = {}
        for _, branch in found:
            assert branch.cut > 0
            longest[branch.output] = max(branch.cut, longest.get(branch.output, 0))
        segments: list[tuple[Hashable, Sequence[int]]] = [(name, tree.prompt)]
        segments += [((*name, output), tree.outputs[output][:cut]) for output, cut in longest.items()]
        place = {output: i for i, output in enumerate(longest, start=1)}
        yield _Unit(segments, [(uid, place[branch.output], branch.cut) for uid, branch in found])
