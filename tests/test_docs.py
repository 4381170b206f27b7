"""What README and the pages under docs/ show is run here, as it stands there, on models made in the test.

A block of bash, Python or TOML is run, in the order of its page, unless a comment above it says why it is not:
`<!-- not run: it installs packages -->`. Sizes are made small: a page's commands are run for what they are, not for
what they would come to."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from groupwise.demo.model import small_model
from groupwise.jobfile import load_job
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("bash", "python", "toml")
MARK = re.compile(r"<!-- not run: (.+) -->$")
SMALL = {
    "train": "train.steps=1 train.warmup_steps=0 train.prompts_per_step=2 sampling.num_generations=2 "
    "sampling.max_completion_length=4"
}
SMALL["doctor"] = SMALL["train"]
SMALL["resume"] = "train.steps=2"

COMMAND = """#!{python}
import sys
from groupwise.cli import main
small = {small!r}
arguments = ["model" if one.startswith(("Qwen/", "./my-model")) else one for one in sys.argv[1:]]
is_policy = arguments[0] in small and "runs/orm" not in arguments
sizes = small[arguments[0]].split() if is_policy else []
sys.argv = ["groupwise", *arguments, *(part for size in sizes for part in ("--set", size))]
main()
"""
"""`groupwise` with a tiny model in the place of a real one, and with small sizes after those that the page gives."""


class Block(NamedTuple):
    """A fenced block: its page and line, its language, its text, and why it is not run."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None


def blocks(page: Path, text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        above = MARK.match(lines[start - 1]) if start else None
        body = "\n".join(lines[start + 1 : number]) + "\n"
        found.append(Block(page, start + 1, lines[start][3:].strip(), body, above[1] if above else None))
        start = None
    assert start is None, f"{page.name}: the block of line {start} has no end"
    return found


ALL = [block for page in PAGES for block in blocks(page, page.read_text(encoding="utf-8"))]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny chat model and the files that pages speak of, in which `groupwise` is found."""
    folder = tmp_path / "desk"
    folder.mkdir()
    tokenizer = byte_level(CHAT_TEMPLATE)
    small_model(len(tokenizer), hidden=32, layers=2, max_length=512).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "bin").mkdir()
    command = folder / "bin" / "groupwise"
    command.write_text(COMMAND.format(python=sys.executable, small=SMALL))
    command.chmod(0o755)
    for name, line in FILES.items():
        (folder / name).write_text(line)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])))
    return folder


FILES = {
    "prompts.jsonl": '{"prompt": "12+30=", "answer": "42"}\n{"prompt": "1+1=", "answer": "2"}\n',
    "solved.jsonl": '{"prompt": "12+30=", "answer": "42", "outputs": ["2+0=2\\n42", "44"]}\n',
    "rewards.py": "def score(completion, answer):\n    return float(answer in completion)\n",
    "steps.py": "def score(steps, **columns):\n    return [[1.0] * len(one) for one in steps]\n",
    "verify.py": "def correct(completion, answer):\n    return float(answer in completion)\n",
    "graded.jsonl": "".join(
        f'{{"prompt": "{number}+1=", "completion": "{number + right}", "label": {right}}}\n'
        for number in range(6)
        for right in (0, 1)
    ),
    "steps.jsonl": "".join(
        f'{{"prompt": "{number}+1=", "completions": ["a", "b"], "labels": [true, false]}}\n' for number in range(8)
    ),
}
"""What a page takes for granted that the reader has."""
BEFORE = {"labels.md": "groupwise train --model model --data prompts.jsonl --reward rewards.py:score --run runs/mine"}
"""And what it takes for granted that the reader has done."""


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a dozen commands, each of which imports torch
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(one.page == page and one.language in LANGUAGES for one in ALL)],
    ids=lambda page: page.name,
)
def test_a_page_does_what_it_says(page: Path, desk: Path) -> None:
    if page.name in BEFORE:
        subprocess.run(BEFORE[page.name].split(), cwd=desk, capture_output=True, check=True)
    for block in (one for one in ALL if one.page == page and one.language in LANGUAGES and one.reason is None):
        where = f"{page.name}, line {block.line}"
        if block.language == "toml":
            (desk / "block.toml").write_text(block.text)
            load_job(desk / "block.toml", options={"model": "model", "data": "prompts.jsonl"})
            continue
        text = block.text.replace("Qwen/Qwen2.5-0.5B-Instruct", "model").replace("Qwen/Qwen2.5-0.5B", "model")
        if block.language == "python":
            text = text.replace("steps=20", "steps=1").replace("max_completion_length=64", "max_completion_length=4")
            command = [sys.executable, "-c", text]
        else:
            command = ["bash", "-euc", block.text]
        done = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{where}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_every_block_is_run_or_says_why_not() -> None:
    for block in ALL:
        assert block.language in (*LANGUAGES, "json", ""), f"{block.page.name}, line {block.line}"
    unrun = [block for block in ALL if block.language in LANGUAGES and block.reason is not None]
    assert len(unrun) <= 5, "a page is to be run; few of its blocks cannot be"
    assert sum(block.language in LANGUAGES for block in ALL) >= 10


def test_what_make_is_shown_to_do_it_can_do() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for page in PAGES for name in re.findall(r"`?\bmake ([a-z-]+)\b(?=[`\s])", _code(page))}
    assert named
    assert named <= set(targets)


def _code(page: Path) -> str:
    """What of a page is code: its blocks without a language, and what stands in backticks."""
    text = page.read_text(encoding="utf-8")
    fenced = [block.text for block in ALL if block.page == page and block.language == ""]
    return "\n".join([*fenced, *(f"`{one}`" for one in re.findall(r"`(make [^`]*)`", text))])


def test_a_toml_block_is_a_job() -> None:
    for block in ALL:
        if block.language == "toml":
            assert tomllib.loads(block.text)


def test_blocks_are_found_with_their_reasons() -> None:
    text = "a\n\n<!-- not run: why -->\n```bash\nexit 1\n```\n```python\nx\n```\n"
    first, second = blocks(Path("a.md"), text)
    assert (first.language, first.text, first.reason, first.line) == ("bash", "exit 1\n", "why", 4)
    assert (second.language, second.text, second.reason) == ("python", "x\n", None)
    with pytest.raises(AssertionError, match="has no end"):
        blocks(Path("a.md"), "```\n")


def test_a_relative_link_leads_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", ["terminal.svg", "../README.md", "architecture.md"])
def test_the_terminals_picture_and_the_tree_are_what_the_code_says(page: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == pages[page](), "run `make docs`"


def test_what_readme_says_of_models_is_what_the_sweep_found() -> None:
    classes = json.loads((ROOT / "docs" / "models.json").read_text(encoding="utf-8"))["classes"]
    hold = sum("layout" in found and not found["failed"] for found in classes.values())
    assert f"{hold} of transformers' {len(classes)} causal types hold" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )


def test_every_part_of_the_package_is_in_the_tree() -> None:
    rooms = runpy.run_path(str(ROOT / "docs" / "generate.py"))["ROOMS"]
    package = ROOT / "src" / "groupwise"
    assert set(rooms) == {init.parent.name for init in package.glob("*/__init__.py")}
