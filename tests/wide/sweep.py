"""Every causal class that transformers has, on a small random model: does what the library computes equal the stock
model, one output at a time? `python -m tests.wide.sweep` writes docs/models.json, from which docs/models.md is made.

    python -m tests.wide.sweep                  classes that the file does not have yet, of this version of transformers
    python -m tests.wide.sweep --again          all of them
    python -m tests.wide.sweep llama gemma3     these"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import groupwise
from groupwise.demo.model import character_tokenizer
from groupwise.engines.mailbox import Mailbox, generate
from groupwise.engines.native.engine import NativeEngine
from groupwise.errors import GroupwiseError
from groupwise.jobfile import load_job
from groupwise.learn.optimizer import MasterOptimizer, OptimizerSettings
from groupwise.models.load import LoadedPolicy, load_policy
from groupwise.models.policy import Policy
from groupwise.planning.plan import plan_of
from groupwise.tokenizer.codec import Codec
from groupwise.types import Request, Sampling
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wording import one_line
from tests.tiny_models import GROUPS, VOCABULARY, Groups, gradients, largest_difference, randomized, stock_logprobs
from tests.wide.shrink import small_config

RESULTS = Path(__file__).parents[2] / "docs/models.json"
KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CHECKS = ("log-probs", "gradients", "sampling", "plan", "bfloat16", "training, resume and export")
SECONDS = 240
"""No class takes as long as this on a machine that does nothing else; one that hangs is ended."""
_CLOSE, _SLOPE = 5e-4, 2e-2
_TEMPERATURE = 0.9
_ALPHABET = "abcdefghijklmnopqrstuvwxyz,.!?"
assert len(_ALPHABET) + 2 == VOCABULARY
_PROMPTS = ["abcdefgh", "a", "hello,there", "no."]
_JOB = [
    "sampling.num_generations=4", "sampling.max_completion_length=9", "train.prompts_per_step=2", "train.steps=2",
    "train.learning_rate=1e-3", "objective.beta=0.05", "checkpoint.every=1", "checkpoint.keep=2",
]  # fmt: skip


def vowels(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs between outputs."""
    return [sum(text.count(letter) for letter in "aeiou") + 0.01 * len(text) for text in completions]


def examine(kind: str, at: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """All that holds and does not hold of a class: docs/generate.py makes a page of it."""
    found: dict[str, Any] = {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "failed": {}}
    try:
        folder = at / "model"
        model = _small_model(kind)
        model.save_pretrained(folder)
        character_tokenizer(_ALPHABET).save_pretrained(folder)
        if (more := len(AutoTokenizer.from_pretrained(folder))) > VOCABULARY:  # some types add a token of their own
            model = _small_model(kind, more)
            model.save_pretrained(folder)
        stock = _stock(folder)
        stock_logprobs(stock, GROUPS)
    except Exception as error:  # noqa: BLE001 - a boundary: what cannot be built alone is listed with its reason
        return found | {"not_built": _words(error)}
    found["class"] = type(model).__name__
    try:
        loaded = load_policy(str(folder), device="cpu")
    except GroupwiseError as error:
        return found | {"refused": _words(error).replace(str(folder), "MODEL")}
    except Exception as error:  # noqa: BLE001 - a boundary: a fault of ours, which is the result
        return found | {"failed": {"load": _words(error)}}
    policy = loaded.policy
    found |= {
        "layout": policy.layout, "direct": policy.direct is not None, "head": policy.head is not None,
        "cached": policy.layout == "shared" or policy.cached, "line": loaded.line.split(": ", 1)[-1],
    }  # fmt: skip
    checks: dict[str, Callable[[], None]] = {
        "log-probs": lambda: _logprobs(loaded, stock),
        "gradients": lambda: _gradients(loaded, stock),
        "sampling": lambda: _sampling(loaded, stock),
        "plan": lambda: _plan(folder),
        "bfloat16": lambda: _bfloat16(folder, at),
        "training, resume and export": lambda: _training(folder, at, stock),
    }
    found["checked"] = list(only or CHECKS)
    for name in found["checked"]:
        check = checks[name]
        try:
            check()
        except Exception as error:  # noqa: BLE001 - a boundary: whatever goes wrong is the result
            found["failed"][name] = _words(error).replace(str(at), "FOLDER")
    return found


def _small_model(kind: str, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind, vocabulary), dtype=torch.float32)
    return randomized(model)


def _stock(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers has it, in eval mode; nothing of ours."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def _logprobs(loaded: LoadedPolicy, stock: PreTrainedModel) -> None:
    policy = loaded.policy
    with torch.no_grad():
        found, entropy = policy(policy.stream(GROUPS), 0.7, entropy=True)
        expected, expected_entropy = stock_logprobs(stock, GROUPS, 0.7)
    _close(found, expected, "log-probs")
    _close(entropy, expected_entropy, "entropies")


def _gradients(loaded: LoadedPolicy, stock: PreTrainedModel) -> None:
    policy = loaded.policy
    ours = gradients(policy.model, policy(policy.stream(GROUPS)).logprobs_T, partial=True)
    theirs = gradients(stock, stock_logprobs(stock, GROUPS)[0], partial=True)
    policy.model.zero_grad()
    difference = largest_difference(ours, theirs)
    assert difference < _SLOPE, f"gradients differ by {difference:.2g} of the largest"
    assert any(gradient.abs().max() > 1e-4 for gradient in theirs.values()), "no gradient at all"


def _sampling(loaded: LoadedPolicy, stock: PreTrainedModel) -> None:
    groups, found = _sample(loaded.policy)
    with torch.no_grad():
        expected, _ = stock_logprobs(stock, groups, _TEMPERATURE)
    _close(found, expected, "sampled log-probs")


def _sample(policy: Policy) -> tuple[Groups, Tensor]:
    """Prompts and outputs of them, and the log-probs that the sampler recorded."""
    codec = Codec(character_tokenizer(_ALPHABET))
    settings = Sampling(max_tokens=12, temperature=_TEMPERATURE)
    asked = [Request(str(i), codec.encode_prompt(text), 3, settings, 100 * i) for i, text in enumerate(_PROMPTS)]
    outputs = generate(Mailbox(NativeEngine(policy, codec, max_live=8)), asked)
    groups = [(r.token_ids, [o.token_ids for o in group]) for r, group in zip(asked, outputs, strict=True)]
    return groups, torch.tensor([x for group in outputs for output in group for x in output.sampled_logprobs])


def _training(folder: Path, at: Path, stock: PreTrainedModel) -> None:
    """Two steps; the second again from the checkpoint of the first; export, and what the stock class reads of it."""
    run, rows = at / "run", [{"prompt": prompt} for prompt in _PROMPTS]
    groupwise.train(
        model=folder, data=rows, reward=vowels, run=run, show="quiet",
        overrides=[*_JOB, "model.dtype=float32", "model.device=cpu"],
    )  # fmt: skip
    last = run / "checkpoints/step-00000002"
    before = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    groupwise.resume(run, data=rows, reward=vowels, show="quiet")
    after = load_file(last / "model.safetensors")
    changed = [name for name in before if not before[name].equal(after[name])]
    assert not changed, f"a resumed run has other weights: {changed[:3]}"
    exported = _stock(groupwise.export(run, at / "exported"))
    aliases = json.loads((last / "manifest.json").read_text())["aliases"]["model"]
    weights = after | {alias: after[name] for alias, name in aliases.items()}
    stock.load_state_dict(stock.state_dict() | weights)
    with torch.no_grad():
        _close(stock_logprobs(exported, GROUPS)[0], stock_logprobs(stock, GROUPS)[0], "exported log-probs")


def _bfloat16(folder: Path, at: Path) -> None:
    """Where the stock class computes in bfloat16, so do training and sampling."""
    try:
        with torch.no_grad():
            stock_logprobs(_stock(folder, torch.bfloat16), GROUPS)
    except Exception:  # noqa: BLE001 - a boundary: what stock cannot do is not asked of us
        return
    policy = load_policy(str(folder), device="cpu", dtype="bfloat16").policy
    optimizer = MasterOptimizer(policy.model, OptimizerSettings(1e-3, 1), torch.bfloat16)
    policy(policy.stream(GROUPS)).logprobs_T.sum().backward()
    norm, _ = optimizer.step()
    assert 0 < norm < float("inf"), f"the gradient's norm is {norm}"
    groups, sampled = _sample(policy)
    with torch.no_grad():
        found = policy(policy.stream(groups), _TEMPERATURE).logprobs_T
    difference = (found - sampled).abs().mean().item()
    assert difference < 0.2, f"sampled and recomputed log-probs differ by {difference:.2g} on average"


def _plan(folder: Path) -> None:
    named = {"model": folder, "max_prompt_length": 8, "data": str(folder / "rows.jsonl"), "reward": ["checks:boxed"]}
    job = load_job(None, [*_JOB, "model.device=cpu"], named).job
    assert plan_of(job, PythonObjects(rows=[], rewards=[vowels]), memory_only=True).needed > 0


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    difference = (found - expected).abs().max().item()
    assert difference < _CLOSE, f"{what} differ by {difference:.2g}"


def _words(error: Exception) -> str:
    text = one_line(error, 300)
    if not isinstance(error, GroupwiseError | AssertionError):
        text = f"{type(error).__name__}: {text}"
    return re.sub(r"0x[0-9a-f]+", "0x..", text)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in whatever takes longer."""

    def ring(*args: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one(kind: str, only: Sequence[str] = ()) -> dict[str, Any]:
    """What `examine` finds, in a folder of its own that is removed."""
    transformers.utils.logging.set_verbosity(50)
    with tempfile.TemporaryDirectory() as at, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with at_most(SECONDS):
                return examine(kind, Path(at), only)
        except TimeoutError as error:
            return {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], "failed": {"time": str(error)}}


def main() -> None:
    """Examine classes and store what was found after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", action="append", choices=CHECKS, default=[])
    parser.add_argument("--to", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for kind in asked.kinds or KINDS:
        stored: dict[str, Any] = json.loads(asked.to.read_text()) if asked.to.exists() else {}
        if stored.get("transformers") != transformers.__version__:
            stored = {"transformers": transformers.__version__, "classes": {}}
        if kind in stored["classes"] and not asked.kinds and not asked.again:
            continue
        start = time.perf_counter()
        found = one(kind, asked.only)
        stored = json.loads(asked.to.read_text()) if asked.to.exists() else stored
        stored["classes"][kind] = found
        stored["classes"] = dict(sorted(stored["classes"].items()))
        partial = asked.to.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, asked.to)
        what = found.get("not_built") or found.get("refused") or found["failed"] or "holds"
        print(f"{kind}: {what} ({time.perf_counter() - start:.1f} s)", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
