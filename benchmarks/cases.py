"""What is measured: shapes of models, cases, and the rows of the table with their bars. No import outside the standard
library, since every environment reads this."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

SEED = 0
PAD, END = 0, 1
"""Token ids that are no word. Token `i` from 2 on is the word `w<i>`."""
MEAN, SPREAD = 48.0, 0.7
"""Natural lengths: the mean of the log-normal and the standard deviation of its logarithm."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2 of random weights with tied embeddings."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def trunk(self) -> int:
        """Parameters of the layers' matrices: N."""
        narrow = self.hidden // self.heads * self.kv_heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * narrow + 3 * self.intermediate)

    @property
    def head(self) -> int:
        """Parameters of the head: H times V."""
        return self.hidden * self.vocabulary


SHAPES = {
    "micro": Shape(32, 2, 48, 2, 1, 53),  # for the test of the workers only
    "tiny": Shape(128, 4, 384, 4, 2, 53),
    "small": Shape(512, 8, 1536, 8, 2, 8192),
    "qwen05": Shape(896, 24, 4864, 14, 2, 151936),
}


@dataclass(frozen=True)
class Case:
    """`prompts` times `outputs`, each prompt of `prompt` tokens, each output of exactly `completion`.

    With `natural` the lengths are log-normal with a mean of 48 instead, and `completion` is their limit.
    """

    shape: str
    prompts: int
    outputs: int
    prompt: int
    completion: int
    beta: float = 0.0
    natural: bool = False

    def prompt_ids(self, number: int) -> list[int]:
        """The tokens of prompt `number`; no two are alike, so that no cache can serve one twice."""
        chance = random.Random(f"{SEED} prompt {number}")
        return chance.choices(range(2, SHAPES[self.shape].vocabulary), k=self.prompt)

    def lengths(self, step: int) -> list[int]:
        """The prescribed length of every output of a step, groups one after the other."""
        rows = self.prompts * self.outputs
        if not self.natural:
            return [self.completion] * rows
        chance = random.Random(f"{SEED} lengths {step}")
        middle = math.log(MEAN) - SPREAD**2 / 2  # the mean of the logarithm that gives the lengths their mean
        drawn = [round(chance.lognormvariate(middle, SPREAD)) for _ in range(rows)]
        return [min(max(length, 1), self.completion) for length in drawn]


def text_of(token_ids: list[int]) -> str:
    """A prompt as text: one word per token."""
    return " ".join(f"w{token}" for token in token_ids)


def reward_of(token_ids: list[int]) -> float:
    """A reward in [0, 1) that costs nothing and differs between any two outputs that differ, as good as always."""
    total = 0
    for place, token in enumerate(token_ids, 1):
        total += place * token
    return total * 2654435761 % 1009 / 1009


def training_flops(case: Case, step: int = 0) -> float:
    """Floor of the training phase with shared prompts: forward and backward over every token once, head on outputs."""
    shape = SHAPES[case.shape]
    outputs = sum(case.lengths(step))
    forward = 2 * shape.trunk * (case.prompts * case.prompt + outputs) + 2 * shape.head * outputs
    # A reference is one more forward.
    return (3 if case.beta == 0 else 4) * (forward + _attention(case, step))


def sampling_flops(case: Case, step: int = 0) -> float:
    """Floor of sampling: each prompt once, each output token once with the head."""
    shape = SHAPES[case.shape]
    prefill = 2 * shape.trunk * case.prompts * case.prompt
    return prefill + sum(case.lengths(step)) * 2 * (shape.trunk + shape.head) + _attention(case, step)


def step_flops(case: Case, step: int = 0) -> float:
    """Floor of a whole step."""
    return training_flops(case, step) + sampling_flops(case, step)


def _attention(case: Case, step: int) -> float:
    """Two products per pair of a token and what it sees, in every layer, forward only."""
    shape, p = SHAPES[case.shape], case.prompt
    pairs = case.prompts * p * (p + 1) / 2 + sum(c * p + c * (c + 1) / 2 for c in case.lengths(step))
    return 4.0 * shape.hidden * shape.layers * pairs


@dataclass(frozen=True)
class Row:
    """One row of the table. `kind` says how it is measured (see `measure.py`), `bar` what is asked of its ratio.

    `alone`: workers do not fit into memory together.
    """

    name: str
    kind: str
    title: str
    case: Case
    bar: float
    alone: bool = False
    values: tuple[int, ...] = field(default=())


TINY_16, TINY_256 = Case("tiny", 16, 8, 16, 64), Case("tiny", 16, 8, 256, 64)
SMALL_16, SMALL_256 = Case("small", 8, 8, 16, 64), Case("small", 8, 8, 256, 64)
SMALL_256_BETA = Case("small", 8, 8, 256, 64, beta=0.04)
SMALL_NATURAL = Case("small", 8, 8, 128, 256, natural=True)
QWEN05 = Case("qwen05", 2, 8, 128, 32)
SLOPE = Case("small", 8, 8, 128, 64)

ROWS = {
    row.name: row
    for row in (
        Row("tiny-p16", "step", "step, tiny P16", TINY_16, 1.5),
        Row("small-p16", "step", "step, small P16", SMALL_16, 2.0),
        Row("tiny-p256", "step", "step, tiny P256", TINY_256, 4.0),
        Row("small-p256", "step", "step, small P256", SMALL_256, 5.5),
        Row("small-p256-beta", "step", "step, small P256, beta 0.04", SMALL_256_BETA, 5.5),
        Row("qwen05", "step", "step, 0.5B shape, Q2 G8 P128 C32", QWEN05, 4.5, alone=True),
        Row("small-natural", "step", "step, small P128, natural lengths", SMALL_NATURAL, 5.0),
        Row("generate-tiny-p16", "generate", "sampling against generate, tiny P16", TINY_16, 1.3),
        Row("generate-tiny-p256", "generate", "sampling against generate, tiny P256", TINY_256, 4.0),
        Row("generate-small-p256", "generate", "sampling against generate, small P256", SMALL_256, 3.0),
        Row("vllm-tiny-p16", "vllm", "sampling against vLLM, tiny P16", TINY_16, 1.1),
        Row("vllm-tiny-p256", "vllm", "sampling against vLLM, tiny P256", TINY_256, 1.1),
        Row("vllm-small-p256", "vllm", "sampling against vLLM, small P256", SMALL_256, 2.0),
        Row("memory-tiny", "memory", "peak memory, tiny P256", TINY_256, 2.0),
        Row("memory-small", "memory", "peak memory, small P256", SMALL_256, 2.0),
        Row("share-small-fp32", "share", "training, small P256 fp32: share of product rate", SMALL_256, 0.6),
        Row("share-small-bf16", "share", "training, small P256 bf16: share of product rate", SMALL_256, 0.45),
        Row("share-qwen05-fp32", "share", "training, 0.5B shape fp32: share of product rate", QWEN05, 0.6),
        Row("share-qwen05-bf16", "share", "training, 0.5B shape bf16: share of product rate", QWEN05, 0.45),
        Row("slope-g", "slope", "cost against G, small Q8 P128 C64", SLOPE, 0.25, values=(1, 2, 4, 8, 16, 32)),
        Row("slope-p", "slope", "cost against P, small Q8 G8 C64", SLOPE, 0.25, values=(16, 128, 512, 1024, 2048)),
    )
}
