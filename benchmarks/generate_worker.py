"""Sampling by `generate` of transformers, prompts repeated per output; outputs run to their full length."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers

from benchmarks.cases import SHAPES, Case
from benchmarks.protocol import Channel, peak, resident

AFTER_IMPORTS = resident()


def main() -> None:
    """Serve the case and the settings of the command line."""
    settings = json.loads(sys.argv[1])
    case, channel = Case(**settings["case"]), Channel()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        settings["folder"], dtype=getattr(torch, settings["dtype"])
    )
    config = transformers.GenerationConfig(
        max_new_tokens=case.completion, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
        # No row of the logits has this number.
        eos_token_id=SHAPES[case.shape].vocabulary, cache_implementation=settings["cache"], disable_compile=True,
    )  # fmt: skip
    channel.send(versions={m.__name__: m.__version__ for m in (torch, transformers)}, threads=torch.get_num_threads())
    for command in channel.commands():
        first = command["sample"] * case.prompts
        ids = torch.tensor([case.prompt_ids(first + i) for i in range(case.prompts)])
        ids = ids.repeat_interleave(case.outputs, 0)
        config.max_new_tokens = length = command.get("short", case.completion)
        start = time.perf_counter()
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        seconds = time.perf_counter() - start
        assert found.shape == (len(ids), case.prompt + length), f"outputs are {tuple(found.shape)}"
        channel.send(seconds=seconds, tokens=len(ids) * length, peak=peak() - AFTER_IMPORTS)


if __name__ == "__main__":
    main()
