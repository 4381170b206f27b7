"""Writes the pages that come from the code: `make docs`. A test fails when a committed page is not what this writes."""

import ast
import json
import re
from pathlib import Path
from typing import Any

from groupwise import jobfile
from groupwise.jobfile import reward_model
from groupwise.watch import metrics
from groupwise.watch.panel import Sample, draw_svg

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/groupwise"
TREE = "src/groupwise/\n", "tests/  "
LOOP = "<!-- the loop -->", "<!-- end of the loop -->"
FILES = "<!-- Written by docs/generate.py from the docstrings. -->", "<!-- end of files -->"
ROOMS = (
    "jobfile", "objective", "tokenizer", "cpu", "models", "data", "engines", "rewards", "learn", "store", "watch",
    "reward_models", "run", "demo", "wiring", "planning", "diagnosis", "commands", "recipes",
)  # fmt: skip
KEYS = "<!-- Written by docs/generate.py from src/groupwise/jobfile/reward_model.py. -->", "<!-- end of keys -->"


def reward_models() -> str:
    """The page on reward models with its table of keys made anew; the rest of it is written by hand."""
    return _between("reward-models.md", KEYS, f"\n\n{reward_model.reference()}\n")


def terminal() -> str:
    """The picture of the terminal, drawn from the recorded events of one run of the embedded job, up to its step 80."""
    recorded = json.loads(Path(__file__).with_name("terminal.json").read_text(encoding="utf-8"))
    sample = Sample(**recorded["sample"])
    return draw_svg(recorded["events"], total_steps=recorded["total_steps"], title=recorded["title"], sample=sample)


def readme() -> str:
    """README with the tree of folders made anew, each with the first sentence of its docstring."""
    loop = (PACKAGE / "run/loop.py").read_text(encoding="utf-8")
    body = loop[loop.index("def train(") :].rstrip()
    page = _between("../README.md", LOOP, f"\n\n<!-- not run: it is part of a file -->\n```python\n{body}\n```\n\n")
    lines = ["  *.py                   what every room stands on: types, config, errors, seeds; and the command line"]
    lines += [_line(PACKAGE / room / "__init__.py", "  ", f"{room}/") for room in ROOMS]
    start = page.index(TREE[0]) + len(TREE[0])
    return page[:start] + "\n".join(lines) + "\n" + page[page.index(TREE[1], start) :]


def architecture() -> str:
    """The page on architecture with its list of files made anew; the rest of it is written by hand."""
    lines = [_line(file, "  ") for file in sorted(PACKAGE.glob("*.py")) if not file.name.startswith("__")]
    for room in ROOMS:
        inside = sorted(file for file in (PACKAGE / room).rglob("*") if file.suffix in (".py", ".c"))
        named = [(file, str(file.relative_to(PACKAGE / room))) for file in inside if file.stem != "__init__"]
        lines += [f"  {room}/", *(_line(file, "    ", name) for file, name in named)]
    files = "\n".join(filter(None, lines))
    return _between("architecture.md", FILES, f"\n\n```\nsrc/groupwise/\n{files}\n```\n\n")


def _between(page: str, marks: tuple[str, str], new: str) -> str:
    """A page with what stands between two marks replaced."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    start = text.index(marks[0]) + len(marks[0])
    return text[:start] + new + text[text.index(marks[1], start) :]


def _line(file: Path, indent: str, name: str = "") -> str:
    """A file's name and what it is for: its docstring's first sentence, or the first line of a comment."""
    text = file.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) if file.suffix == ".py" else text.lstrip("/* ").partition("\n")[0]
    if not said:
        return ""
    first = re.split(r"\.(?:\s|$)", " ".join(said.split()), maxsplit=1)[0].partition(" */")[0]
    return f"{indent + (name or file.name):<24} {first}"


MODELS = """# Model classes

<!-- Written by docs/generate.py from models.json, which `python -m tests.wide.sweep` writes. -->

Any causal class of transformers is served: a probe of its class at every load finds out how. This table is what was
found of all {count} types in transformers {version}, on small random models that are compared with the stock class
one output at a time: log-probs and gradients, the log-probs that the sampler records, training in bfloat16, and,
where the last column says "all", a resumed run to the bit and what the stock class reads of the export. `make
test-wide` makes it anew.

| result | types |
|---|---|
| hold | {hold} |
| do not, as said below | {fail} |
| are refused, with the reason below | {refused} |
| cannot be built by themselves | {not_built} |

**Layout.** `shared`: a prompt is computed once for all of its outputs; `plain`: once per output. **Past the
modules**: the forward is written out over the model's weights, on a CPU with kernels of its own. **Sampling**: by a
key/value cache, or by computing every row again for each token, which is right and slow. **Head**: `chunks` never
holds logits of the whole vocabulary; `whole` does.

{multimodal}
| type | class | layout | past the modules | sampling | head | checked |
|---|---|---|---|---|---|---|
{rows}

## Faults

{faults}

## Refused

{refusals}

## Not built

Parts of larger models, or classes that need another library.

{unbuilt}
"""


def models() -> str:
    """The page on model classes, from what the sweep found."""
    stored = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    classes: dict[str, dict[str, Any]] = stored["classes"]
    served = {kind: found for kind, found in classes.items() if "layout" in found}
    reasons = {key: [(k, f[key]) for k, f in classes.items() if key in f] for key in ("refused", "not_built")}
    faults = [(k, f"{name}: {why}") for k, f in classes.items() for name, why in f["failed"].items()]
    failing = {kind for kind, _ in faults}
    return MODELS.format(
        count=len(classes), version=stored["transformers"], hold=len(served.keys() - failing), fail=len(failing),
        refused=len(reasons["refused"]), not_built=len(reasons["not_built"]), multimodal=MULTIMODAL,
        rows="\n".join(_class_row(kind, found, kind in failing) for kind, found in served.items()),
        faults=_listed(faults), refusals=_listed(reasons["refused"]), unbuilt=_listed(reasons["not_built"]),
    )  # fmt: skip


def _class_row(kind: str, found: dict[str, Any], fails: bool) -> str:
    checked = "see faults" if fails else ", ".join(found["checked"])
    if not fails and "training, resume and export" in found["checked"]:
        checked = "all"
    words = [
        f"`{kind}`", found["class"], found["layout"], "yes" if found["direct"] else "",
        "cache" if found["cached"] else "whole rows", "chunks" if found["head"] else "whole", checked,
    ]  # fmt: skip
    return f"| {' | '.join(words)} |"


def _listed(lines: list[tuple[str, str]]) -> str:
    """One line for each reason, with all that have it."""
    by_reason: dict[str, list[str]] = {}
    for kind, why in lines:
        by_reason.setdefault(why.replace(f"({kind}) ", "").replace("|", "/"), []).append(f"`{kind}`")
    return "\n".join(f"- {', '.join(kinds)}: {why}" for why, kinds in by_reason.items()) or "None."


MULTIMODAL = """\
**Models that read more than text** (Gemma 3, Qwen3.5): their text model is trained, on text. What they have for
images and sound is frozen, or not even loaded where transformers has a class for the text alone; the line at load
says which. An export is the whole model again: those tensors are read from the base model's folder and written as
they are there, so that the original class loads it with new text weights. Where that class cannot be loaded (it may
need `timm`, say), the text model alone is exported, and a sentence says so. Types of which transformers has no causal
class (Llava, Qwen2-VL) are refused in a sentence: save their language model as a folder of its own.

**bfloat16** is what the class itself computes in when it is loaded so: routers that it keeps in float32 stay, buffers
are cast where it makes them so. Master weights and exports keep them as they were. **Frozen parameters**, of a class
that never trains some, are in no checkpoint: they are taken from the base model. **The longest row** is read by every
name that configurations have for it.
"""
PAGES = {
    "../README.md": readme,
    "architecture.md": architecture,
    "terminal.svg": terminal,
    "models.md": models,
    "configuration.md": jobfile.reference,
    "metrics.md": metrics.document,
    "reward-models.md": reward_models,
    "job.schema.json": lambda: json.dumps(jobfile.json_schema(), indent=2) + "\n",
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (Path(__file__).parent / name).write_text(text(), encoding="utf-8")
        print(Path("docs", name))
