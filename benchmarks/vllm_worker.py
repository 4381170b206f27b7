"""Sampling by vLLM's CPU build, in its own environment: `n` outputs per prompt, prefix cache on, log-probs of the
sampled tokens, which training needs. It need not write text, and no prompt comes twice."""

from __future__ import annotations

import json
import os
import sys
import time

from benchmarks.cases import Case
from benchmarks.protocol import Channel, peak, resident


def main() -> None:
    """Serve the case and the settings of the command line."""
    settings = json.loads(sys.argv[1])
    case, channel = Case(**settings["case"]), Channel()
    # One process: a second one would only take messages to and fro.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    import torch
    import transformers
    import vllm

    after_imports = resident()
    model = vllm.LLM(
        model=settings["folder"], dtype=settings["dtype"], enforce_eager=True, enable_prefix_caching=True,
        skip_tokenizer_init=True, max_model_len=case.prompt + case.completion, max_num_seqs=256, seed=0,
        generation_config="vllm",
    )  # fmt: skip
    modules = (torch, transformers, vllm)
    channel.send(versions={m.__name__: m.__version__ for m in modules}, threads=torch.get_num_threads())
    for command in channel.commands():
        first = command["sample"] * case.prompts
        prompts = [{"prompt_token_ids": case.prompt_ids(first + i)} for i in range(case.prompts)]
        length = command.get("short", case.completion)
        sampling = vllm.SamplingParams(
            n=case.outputs, max_tokens=length, ignore_eos=True, temperature=1.0, logprobs=0, detokenize=False
        )
        start = time.perf_counter()
        found = model.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(one.prompt_token_ids) for one in found] == [case.prompt] * case.prompts
        lengths = [len(output.token_ids) for one in found for output in one.outputs]
        assert lengths == [length] * case.prompts * case.outputs, f"lengths are {lengths}"
        channel.send(seconds=seconds, tokens=sum(lengths), peak=peak() - after_imports)


if __name__ == "__main__":
    main()
