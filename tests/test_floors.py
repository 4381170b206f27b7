"""Imports go down only: a module may import from its own room and from rooms on lower floors."""

import sys
from collections.abc import Iterator

import groupwise
from tests.source import imports, modules

FLOORS = [
    {
        "types",
        "config",
        "errors",
        "seeds",
        "disk",
        "streams",
        "wording",
        "readable",
        "averages",
        "progress",
        "state",
        "jobfile",
    },
    {"tokenizer", "precision"},
    {"objective", "cpu"},
    {"models"},
    {"data", "engines", "rewards", "learn", "store", "demo"},
    {"watch"},
    {"reward_models"},
    {"run"},
    {"wiring"},
    {"planning"},
    {"diagnosis"},
    {"commands"},
    {"cli", "recipes"},
    {"__main__"},
]  # fmt: skip
"""From the ground up. A module imports from its own room and from rooms on lower floors."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

HEAVY = ("tensorboard", "torch.utils.tensorboard", "datasets", "vllm", "ray", "torch.distributed", "wandb")
"""Imported in one file at most, and there inside the function that needs it."""

BRING_TORCH = ("torch", "transformers", "datasets", "numpy", "tokenizers", "safetensors", "pandas")
OF_A_CPU = ("ctypes", "multiprocessing")
"""Compiled code, malloc and copies of this process: for `cpu` alone, behind whose door the others find them."""


def test_imports_go_down_only():
    assert list(wrong_imports(modules())) == []


def test_no_room_takes_the_name_of_what_the_package_offers():
    """A room that is imported becomes an attribute of the package, and would stand in the function's place."""
    rooms = {part_of(module) for module in modules()} - {""}
    assert rooms & set(groupwise.__all__) == {"objective"}, "which is offered as it is"


def test_heavy_libraries_wait_in_one_function():
    assert list(wrong_heavy_imports(modules())) == []


def test_the_objective_knows_numbers_and_tensors_only():
    known = ("groupwise.objective", "groupwise.errors", "groupwise.averages", "torch", "numpy")
    for module, text in modules().items():
        if module.startswith("groupwise.objective"):
            third_party = [name for name in outside_the_standard_library(text) if not within(name, *known)]
            assert third_party == [], module


def test_what_only_a_cpu_needs_is_in_its_room():
    assert list(wrong_cpu_imports(modules())) == []
    assert list(wrong_cpu_imports({"groupwise.engines.pool": "from multiprocessing import Pipe"}))
    assert list(wrong_cpu_imports({"groupwise.store.disk": "def f():\n    import ctypes"}))
    assert not list(wrong_cpu_imports({"groupwise.cpu.forks": "import multiprocessing"}))
    compilers = [module for module, text in modules().items() if "gcc" in text or "mallopt" in text]
    assert {part_of(module) for module in compilers} == {"cpu"}


def test_a_planted_fault_is_found():
    def found(module: str, text: str) -> list[str]:
        return list(wrong_imports({module: text}))

    assert found("groupwise.tokenizer.codec", "from groupwise.run import loop")
    assert found("groupwise.learn.pack", "def f():\n    from groupwise.engines.base import Engine")
    assert found("groupwise.config", "import torch")
    assert found("groupwise.tokenizer.codec", "import torch")
    assert found("groupwise.jobfile.load", "from groupwise.objective import PRESETS")
    assert found("groupwise", "from groupwise.commands.api import train")
    assert found("groupwise.novelty", "import json")
    assert not found("groupwise.jobfile.load", "from groupwise.config import Job")
    assert not found("groupwise", "def f():\n    from groupwise.commands.api import train")
    assert not found("groupwise.run.loop", "from groupwise.learn.pack import Batch\nimport torch")

    assert list(wrong_heavy_imports({"a": "import ray"}))
    assert list(wrong_heavy_imports({"a": "from torch import distributed"}))
    assert list(wrong_heavy_imports({"a": "def f():\n    import ray", "b": "def f():\n    import ray"}))
    assert not list(wrong_heavy_imports({"a": "def f():\n    import ray\ndef g():\n    import ray.train"}))


def wrong_imports(texts: dict[str, str]) -> Iterator[str]:
    for module, text in texts.items():
        own = part_of(module)
        floor = FLOOR_OF.get(own, -1)
        if own and floor == -1:
            yield f"{module} stands on no floor: give it one here"
        for name, deferred in imports(text):
            part = part_of(name)
            if not within(name, "groupwise"):
                wrong = (floor == 0 and within(name, *BRING_TORCH)) or (own == "tokenizer" and within(name, "torch"))
            elif not own:  # the package itself may reach anything, once it is asked for
                wrong = FLOOR_OF.get(part, 0) > 0 and not deferred
            else:
                wrong = part not in ("", own) and FLOOR_OF.get(part, 9) >= max(floor, 1)
            if wrong:
                yield f"{module} imports {name}"


def wrong_cpu_imports(texts: dict[str, str]) -> Iterator[str]:
    for module, text in texts.items():
        found = [name for name, _ in imports(text) if within(name, *OF_A_CPU)]
        if part_of(module) != "cpu":
            yield from (f"{module} imports {name}" for name in found)


def wrong_heavy_imports(texts: dict[str, str]) -> Iterator[str]:
    for heavy in HEAVY:
        found = [(module, one) for module, text in texts.items() for one in imports(text) if within(one.name, heavy)]
        yield from (f"{module} imports {one.name} outside a function" for module, one in found if not one.deferred)
        homes = sorted({module for module, _ in found})
        if len(homes) > 1:
            yield f"{heavy} is imported in {', '.join(homes)}"


def outside_the_standard_library(text: str) -> list[str]:
    return [name for name, _ in imports(text) if name.partition(".")[0] not in sys.stdlib_module_names]


def part_of(name: str) -> str:
    """`"learn"` of `"groupwise.learn.pack.Batch"`; empty for what belongs to the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "groupwise" and parts[1] != "__version__" else ""


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
