"""A program that imports the library, and trains with it, stays what it was: nothing of the process is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.run.tiny import save_model, save_rows

PROGRAM = """
import hashlib, importlib, json, locale, logging, multiprocessing, os, pkgutil, random, resource, signal, sys
import threading, warnings
import numpy, psutil, torch, transformers, tokenizers, pydantic, safetensors.torch
import huggingface_hub.utils
import rich.console, rich.live  # which draws a number of `random` when it is imported
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3 import modeling_qwen3

def digest(data):
    return hashlib.sha256(repr(data).encode()).hexdigest()[:12]

def state():
    names = "", "transformers", "torch", "huggingface_hub", "datasets"
    loggers = {name: logging.getLogger(name).level for name in names}
    umask = os.umask(0)
    os.umask(umask)
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": list(sys.path), "umask": umask,
        "warnings": [repr(found) for found in warnings.filters], "show warning": repr(warnings.showwarning),
        "logging": loggers, "handlers": repr(logging.getLogger().handlers),
        "bars": transformers.utils.logging.is_progress_bar_enabled(),
        "hub bars": huggingface_hub.utils.are_progress_bars_disabled(),
        "signals": {int(s): repr(signal.getsignal(s)) for s in signal.valid_signals()},
        "hooks": repr((sys.excepthook, threading.excepthook, sys.unraisablehook)),
        "streams": repr((sys.stdin, sys.stdout, sys.stderr)),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()],
        "children": len(psutil.Process().children()), "start": multiprocessing.get_start_method(allow_none=True),
        "numbers": repr((torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled())),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "draws": [digest(x) for x in (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state())],
        "locale": locale.setlocale(locale.LC_ALL), "recursion": sys.getrecursionlimit(),
        "limits": [resource.getrlimit(x) for x in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_CORE)],
    }

def changed(before):
    now = state()
    return {name: [before[name], now[name]] for name in now if now[name] != before[name]}

before = state()
import groupwise
for module in pkgutil.walk_packages(groupwise.__path__, "groupwise."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
found = {"import": changed(before)}
model, data = sys.argv[1:]
small = dict(num_generations=2, max_completion_length=6, prompts_per_step=2, steps=2, show="quiet")
reward = lambda prompt, completion: len(completion)
groupwise.train(model=model, data=data, eval_data=data, reward=reward, run="run", **small)
found["train"] = changed(before)
groupwise.sample("run", "ab")
groupwise.evaluate("run", reward=reward)
groupwise.export("run", "out")
groupwise.plan(model=model, data=data, reward=reward, max_completion_length=6)
found["others"] = changed(before)
from groupwise.cpu import malloc
found["heap"] = malloc.keep_freed_memory("cpu")
print(json.dumps(found))
"""


def test_neither_import_nor_training_changes_the_process(tmp_path: Path) -> None:
    data = save_rows(tmp_path / "rows.jsonl")
    command = [sys.executable, "-c", PROGRAM, str(save_model(tmp_path / "model")), str(data)]
    told = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert told.returncode == 0, told.stderr[-3000:]
    found = json.loads(told.stdout.splitlines()[-1])
    assert found == {"import": {}, "train": {}, "others": {}, "heap": False}
