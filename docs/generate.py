"""Writes the pages that come from the code: `make docs`. A test fails when a committed page is not what this writes."""

import json
from pathlib import Path

from groupwise import jobfile

PAGES = {
    "configuration.md": jobfile.reference,
    "job.schema.json": lambda: json.dumps(jobfile.json_schema(), indent=2) + "\n",
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        Path(__file__).with_name(name).write_text(text(), encoding="utf-8")
        print(f"docs/{name}")
