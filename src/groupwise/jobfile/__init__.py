"""Job files: read them, check them, show them, document them. No torch here, so that it is quick."""

from groupwise.jobfile.checks import check
from groupwise.jobfile.describe import json_schema, reference, show, template
from groupwise.jobfile.load import Resolved, at_home, load_job, read_once, recipe_names, refuse_loaded
from groupwise.jobfile.save import Difference, differences, resumable_keys, to_toml

__all__ = [
    "Difference",
    "Resolved",
    "at_home",
    "check",
    "differences",
    "json_schema",
    "load_job",
    "read_once",
    "recipe_names",
    "reference",
    "refuse_loaded",
    "resumable_keys",
    "show",
    "template",
    "to_toml",
]
