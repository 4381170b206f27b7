"""TRL's end of the comparison: its GRPOTrainer, held at the start of each step until a step is asked for.

Runs in TRL's own environment and imports nothing of groupwise. A step is what lies between the trainer's own
`on_step_begin` and `on_step_end`: generation, rewards, loss, update."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks.cases import END, SHAPES, Case, reward_of, text_of
from benchmarks.protocol import Channel, peak, resident
from benchmarks.shapes import tokenizer_of

AFTER_IMPORTS = resident()
PROMPTS = 64
"""How many steps have prompts of their own."""


class Generation:
    """Stands before the model's `generate`: makes outputs as long as prescribed, counts, and takes the time."""

    def __init__(self, generate: Callable[..., Any], case: Case) -> None:
        self.generate, self.case = generate, case
        self.lengths: list[int] = []
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.case.prompts * self.case.outputs
        prompts = kwargs["input_ids"]
        assert prompts.shape == (rows, self.case.prompt), f"prompts are {tuple(prompts.shape)}"
        assert bool(kwargs["attention_mask"].all()), "prompts were padded"
        if self.case.natural:
            kwargs["logits_processor"] = [EndAt(self.case.prompt, self.lengths)]
        start = time.perf_counter()
        found = self.generate(*args, **kwargs)
        self.seconds = time.perf_counter() - start
        assert found.shape[1] - self.case.prompt == max(self.lengths), f"outputs are {tuple(found.shape)}"
        return found


class EndAt(transformers.LogitsProcessor):
    """The end token at each row's prescribed length and nowhere before. In place, one column and few rows."""

    def __init__(self, prompt: int, lengths: list[int]) -> None:
        self.prompt, self.lengths = prompt, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, END] = -torch.inf
        due = (self.lengths == input_ids.shape[1] - self.prompt + 1).nonzero()[:, 0]
        scores[due] = -torch.inf
        scores[due, END] = 0.0
        return scores


class Held(transformers.TrainerCallback):
    """Waits for a command before each step, and answers once the step has been logged (outside the time taken)."""

    def __init__(self, channel: Channel, case: Case) -> None:
        self.channel, self.case = channel, case
        self.commands = channel.commands()
        self.generation: Generation | None = None
        self.trainer: Any = None
        self.lengths_seen: list[int] = []
        self.start = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        command = next(self.commands, None)
        if command is None:
            os._exit(0)  # the trainer has a million steps left, and nothing to tidy up
        assert self.generation is not None
        lengths = self.case.lengths(command["step"])
        if short := command.get("short"):
            lengths = [min(length, short) for length in lengths]
        self.generation.lengths = lengths
        self.trainer.generation_config.max_new_tokens = max(lengths)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.start

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        assert self.generation is not None
        assert self.lengths_seen == self.generation.lengths, f"lengths are {self.lengths_seen}"
        self.channel.send(
            seconds=self.seconds, sample=self.generation.seconds, train=self.seconds - self.generation.seconds,
            loss=float(logs["loss"]), grad_norm=float(logs["grad_norm"]), tokens=sum(self.lengths_seen),
            peak=peak() - AFTER_IMPORTS,
        )  # fmt: skip


def main() -> None:
    """Serve the case and the settings of the command line."""
    settings = json.loads(sys.argv[1])
    case = Case(**settings["case"])
    held = Held(Channel(), case)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(case, settings, held, scratch)
        held.trainer, held.generation = trainer, Generation(trainer.model.generate, case)
        trainer.model.generate = held.generation
        if not case.natural:
            # No row of the logits has this number: outputs run to their full length and it costs nothing.
            trainer.eos_token_ids = [SHAPES[case.shape].vocabulary]
            trainer.generation_config.eos_token_id = trainer.eos_token_ids
            trainer.generation_kwargs["eos_token_id"] = trainer.eos_token_ids
        masters = {str(p.dtype) for p in trainer.model.parameters()}
        held.channel.send(
            versions={m.__name__: m.__version__ for m in (torch, transformers, trl)}, masters=sorted(masters),
            threads=torch.get_num_threads(),
        )  # fmt: skip
        trainer.train()


def build(case: Case, settings: dict[str, Any], held: Held, scratch: str) -> trl.GRPOTrainer:
    """The trainer, with the loss of the preset `grpo`; what is not named here is TRL's default."""
    folder = Path(settings["folder"])

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        held.lengths_seen = [len(ids) for ids in completion_ids]
        return [reward_of(ids) for ids in completion_ids]

    options: dict[str, Any] = {"model_init_kwargs": {"dtype": settings.get("masters", "float32")}}
    if "dtype" in settings:  # else as TRL has it by default
        options |= {"bf16": settings["dtype"] == "bfloat16", "gradient_checkpointing": settings["checkpointing"]}
    config = trl.GRPOConfig(
        output_dir=scratch, max_steps=1_000_000, per_device_train_batch_size=case.prompts * case.outputs,
        num_generations=case.outputs, max_completion_length=case.completion, loss_type="grpo", beta=case.beta,
        epsilon=0.2, num_iterations=1, scale_rewards="group", learning_rate=1e-6, lr_scheduler_type="constant",
        shuffle_dataset=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
        **options,
    )  # fmt: skip
    prompts = [text_of(case.prompt_ids(number)) for number in range(PROMPTS * case.prompts)]
    return trl.GRPOTrainer(
        str(folder), [reward], config, datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer_of(folder, padding_side="left"), callbacks=[held],
    )  # fmt: skip


if __name__ == "__main__":
    main()
