"""Writes the pages that come from the code: `make docs`. A test fails when a committed page is not what this writes."""

import ast
import json
import re
from pathlib import Path

from groupwise import jobfile
from groupwise.jobfile import reward_model
from groupwise.watch import metrics
from groupwise.watch.panel import Sample, draw_svg

ROOT = Path(__file__).parents[1]
TREE = "src/groupwise/\n"
ROOMS = ("objective", "models", "data", "engines", "rewards", "learn", "watch", "jobfile", "run")
RECIPES = "  recipes/               the jobs that come with the package\n"
KEYS = "<!-- Written by docs/generate.py from src/groupwise/jobfile/reward_model.py. -->", "<!-- end of keys -->"


def reward_models() -> str:
    """The page on reward models with its table of keys made anew; the rest of it is written by hand."""
    page = Path(__file__).with_name("reward-models.md").read_text(encoding="utf-8")
    start, end = page.index(KEYS[0]) + len(KEYS[0]), page.index(KEYS[1])
    return f"{page[:start]}\n\n{reward_model.reference()}\n{page[end:]}"


def terminal() -> str:
    """The picture of the terminal, drawn from the recorded events of one run of the embedded job, up to its step 80."""
    recorded = json.loads(Path(__file__).with_name("terminal.json").read_text(encoding="utf-8"))
    sample = Sample(**recorded["sample"])
    return draw_svg(recorded["events"], total_steps=recorded["total_steps"], title=recorded["title"], sample=sample)


def readme() -> str:
    """README with the tree of modules made anew, each with the first sentence of its docstring."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = page.index(TREE) + len(TREE), page.index("tests/  ")
    package = ROOT / "src" / "groupwise"
    lines = [_line(module, "  ") for module in sorted(package.glob("*.py")) if not module.name.startswith("__")]
    for folder in ROOMS:
        lines.append(f"  {folder}/")
        lines += [
            _line(file, "    ")
            for file in sorted((package / folder).iterdir())
            if file.suffix in (".py", ".c") and file.stem != "__init__"
        ]
    return page[:start] + "\n".join(filter(None, lines)) + "\n" + RECIPES + page[end:]


def _line(file: Path, indent: str) -> str:
    """A file's name and what it is for: its docstring's first sentence, or the first line of a comment."""
    text = file.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) if file.suffix == ".py" else text.lstrip("/* ").partition("\n")[0]
    if not said:
        return ""
    first = re.split(r"\.(?:\s|$)", " ".join(said.split()), maxsplit=1)[0].partition(" */")[0]
    return f"{indent + file.name:<24} {first}"


PAGES = {
    "../README.md": readme,
    "terminal.svg": terminal,
    "configuration.md": jobfile.reference,
    "metrics.md": metrics.document,
    "reward-models.md": reward_models,
    "job.schema.json": lambda: json.dumps(jobfile.json_schema(), indent=2) + "\n",
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (Path(__file__).parent / name).write_text(text(), encoding="utf-8")
        print(Path("docs", name))
