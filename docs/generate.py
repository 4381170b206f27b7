"""Writes the pages that come from the code: `make docs`. A test fails when a committed page is not what this writes."""

import json
from pathlib import Path

from groupwise import jobfile
from groupwise.jobfile import reward_model
from groupwise.watch import metrics
from groupwise.watch.panel import Sample, draw_svg

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


PAGES = {
    "terminal.svg": terminal,
    "configuration.md": jobfile.reference,
    "metrics.md": metrics.document,
    "reward-models.md": reward_models,
    "job.schema.json": lambda: json.dumps(jobfile.json_schema(), indent=2) + "\n",
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        Path(__file__).with_name(name).write_text(text(), encoding="utf-8")
        print(f"docs/{name}")
