"""What a pass through a model will take, before there are weights: the pass itself, run on tensors without data.

`FakeTensorMode` computes the shapes and aliases of every operation and allocates nothing. So the model's own code, the
layout, the attention and the head say what they hold and compute, and no table of architectures has to be kept."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from groupwise.errors import ModelError
from groupwise.learn.lanes import deal
from groupwise.learn.optimizer import MasterOptimizer, OptimizerSettings
from groupwise.learn.pack import Output, micro_batches
from groupwise.models.attention import ATTENTION_NAME
from groupwise.models.cast import cast_to_compute_dtype
from groupwise.models.head import HeadShape
from groupwise.models.layout import Stream
from groupwise.models.load import checkpoint_gradients
from groupwise.models.policy import LayoutName, Policy
from groupwise.models.tracing import counter
from groupwise.planning.meter import Cost, Meter
from groupwise.planning.repeats import Counting
from groupwise.wording import one_line

_SILENCED = ("transformers", "torch._subclasses.fake_tensor")


@dataclass(frozen=True)
class Shape:
    """A step of equal groups: `groups` prompts of `prompt` tokens, each with `outputs` outputs of `length` tokens."""

    groups: int
    outputs: int
    prompt: int
    length: int

    def lanes(self, most: int) -> int:
        """How many micro-batches the learner computes at once, where it may do so with `most`."""
        made = self._made()
        return len(deal(made, range(len(made)), most))

    def parts(self, budget: int, shared: bool, most_lanes: int = 1) -> list[tuple[int, ...]]:
        """The micro-batches that the learner cuts, together of at most `budget` tokens in all lanes, the largest first.

        Each is told by how many outputs it takes of each of its groups.
        """
        made = self._made()
        lanes = deal(made, range(len(made)), most_lanes)
        found = []
        for part in [p for lane in lanes for p in micro_batches(made, lane, budget // len(lanes), shared)]:
            counts: dict[int, int] = {}
            for member in part:
                counts[made[member].group] = counts.get(made[member].group, 0) + 1
            found.append(tuple(counts.values()))
        return sorted(found, key=lambda part: -self.tokens(part, shared))

    def _made(self) -> list[Output]:
        prompt, length = (0,) * self.prompt, (0,) * self.length
        return [Output(g, prompt, length, 0) for g in range(self.groups) for _ in range(self.outputs)]

    def tokens(self, part: Sequence[int], shared: bool) -> int:
        """What the linear layers see of a micro-batch."""
        rows = sum(part)
        return len(part) * self.prompt + rows * self.length if shared else rows * (self.prompt + self.length)


class UntraceableError(ModelError):
    """A class of models looks at numbers on its way (which experts are chosen, say): it cannot be run without them."""


@dataclass(frozen=True)
class TracedModel:
    """A policy of which only the configuration is known: it tells what a pass will take, at any size, in a second.

    Its methods raise UntraceableError where the class cannot be run without data.
    """

    config: PreTrainedConfig
    layout: LayoutName
    head: HeadShape | None
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    trust_remote_code: bool = False
    direct: bool = False
    _seen: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def training(self, shape: Shape, part: Sequence[int], checkpointing: bool) -> Cost:
        """Forward and backward of a micro-batch; masters and gradients are there before, as in training."""

        def run(policy: Policy, meter: Meter, dtype: torch.dtype) -> None:
            MasterOptimizer(policy.model, OptimizerSettings(learning_rate=0.0, total_updates=1), dtype)
            stream = _stream(policy, shape, part)
            with meter:
                logprobs_T = policy(stream, 1.0, True).logprobs_T
                meter.mark()
                logprobs_T.sum().backward()

        return self._cost(run, checkpointing)

    def scoring(self, shape: Shape, part: Sequence[int]) -> Cost:
        """Log-probs of a micro-batch without gradient, as for the old policy and the reference."""

        def prepare(policy: Policy) -> Callable[[], object]:
            stream = _stream(policy, shape, part)
            return lambda: policy(stream)

        return self.inference(prepare)

    def inference(self, prepare: Callable[[Policy], Callable[[], object]]) -> Cost:
        """What the function that `prepare(policy)` returns takes, without gradient."""

        def run(policy: Policy, meter: Meter, dtype: torch.dtype) -> None:
            cast_to_compute_dtype(policy.model, dtype)
            with torch.no_grad():
                metered = prepare(policy)
                with meter:
                    kept = metered()
                    meter.mark()
                del kept

        return self._cost(run, False)

    def _cost(self, run: Callable[[Policy, Meter, torch.dtype], None], checkpointing: bool) -> Cost:
        try:
            return self._by_depth(run, checkpointing, self.dtype)
        except Exception as error:
            if self.dtype != torch.float32:
                raise self._opaque(error) from error
        try:
            # Grouped matmuls of experts know no float32 without data. Twice the narrow type is what they then hold.
            narrow = self._by_depth(run, checkpointing, torch.bfloat16)
        except Exception as error:
            # The same boundary.
            raise self._opaque(error) from error
        return Cost(
            2 * narrow.kept, 2 * narrow.peak, narrow.flops, narrow.attention_flops, 2 * narrow.moved, narrow.operations
        )

    def _by_depth(
        self, run: Callable[[Policy, Meter, torch.dtype], None], checkpointing: bool, dtype: torch.dtype
    ) -> Cost:
        """The cost of the whole model; where its layers are alike, by what one more adds to the first one or two: past
        the modules the last one is of another kind."""

        def cost_of(policy: Policy) -> Cost:
            meter = Meter()
            token = counter.set(Counting(meter, self._seen))
            try:
                run(policy, meter, dtype)
            finally:
                counter.reset(token)
            return meter.cost

        least = 2 if self.past_modules else 1
        with _without_data():
            if self._layers <= least:
                return cost_of(self._policy(self.config, checkpointing))
            try:
                few, more = (cost_of(self._policy(self._cut(depth), checkpointing)) for depth in (least, least + 1))
            except Exception:  # noqa: BLE001 - a boundary: a list as long as the model is deep may be of something else
                return cost_of(self._policy(self.config, checkpointing))
        whole = few.plus(more.plus(few, -1), self._layers - least)
        # In a shallow model the most may come late, at the embedding's gradient; in a deep one it comes at the head,
        # where all that is kept still is.
        return replace(whole, peak=max(whole.peak, whole.kept + more.top - more.kept))

    @property
    def can_checkpoint(self) -> bool:
        """Whether the class can compute its layers again in the backward pass."""
        return self._known[0]

    @property
    def past_modules(self) -> bool:
        """Whether the policy goes past the model's modules: `direct` says that it may."""
        return self._known[3]

    @property
    def copies(self) -> int:
        """Bytes of matrices that sampling lays out anew."""
        return self._known[2]

    @property
    def _layers(self) -> int:
        """How many decoder layers there are, where every one is as the first; else 0."""
        return self._known[1]

    @cached_property
    def _known(self) -> tuple[bool, int, int, bool]:
        try:
            with _without_data():
                policy = self._policy(self.config, False)
        except Exception as error:
            # The same boundary: some classes look at what they are made of.
            raise self._opaque(error) from error
        checkpoints = bool(policy.model.supports_gradient_checkpointing)
        copies = policy.bytes_of_copies(self.dtype)
        return checkpoints, _layers_alike(policy.model), copies, policy.direct is not None

    def _cut(self, depth: int) -> PreTrainedConfig:
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == self._layers:
                setattr(text, name, value[:depth])
        text.num_hidden_layers = depth
        return config

    def _policy(self, config: PreTrainedConfig, checkpointing: bool) -> Policy:
        attention: dict[str, Any] = {"attn_implementation": ATTENTION_NAME} if self.layout == "shared" else {}
        # Some classes look at the numbers that they draw; there are none here.
        with torch.device(self.device), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=self.trust_remote_code, **attention
            )
        model.tie_weights()
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # rows would be searched for padding, to warn of it
                module.__dict__["warn_if_padding_and_no_attention_mask"] = _no_remark
        if checkpointing:
            checkpoint_gradients(model, self.config.model_type)
        return Policy(model, self.layout, self.head, direct=self.direct)

    def _opaque(self, error: Exception) -> UntraceableError:
        return UntraceableError(
            f"What a model of type {self.config.model_type} holds and computes cannot be told before its weights are "
            f"loaded ({one_line(error, 200)})."
        )


def _no_remark(*_: object, **__: object) -> None:
    pass


def _stream(policy: Policy, shape: Shape, part: Sequence[int]) -> Stream:
    # With data: it is small, and thousands of operations without would take seconds.
    with unset_fake_temporarily():
        return policy.stream([((0,) * shape.prompt, [(0,) * shape.length] * count) for count in part])


def _layers_alike(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    lists = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList)]
    lists = [layers for layers in lists if len(layers) == config.num_hidden_layers]
    if len(lists) != 1 or len(set(getattr(config, "layer_types", None) or [])) > 1:
        return 0
    parameters = [[(name, p.shape) for name, p in layer.named_parameters()] for layer in lists[0]]
    return len(parameters) if all(one == parameters[0] for one in parameters) else 0


@contextmanager
def _without_data() -> Iterator[None]:
    """Inside, tensors have shapes and no data; remarks on a model that nobody will run are left out."""
    loggers = [logging.getLogger(name) for name in _SILENCED]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
