"""What a command names, looked at before torch is imported and before a model is read: most mistakes are seen at once.

Only what is certain is refused here; what can be told after reading alone is left to what reads it. Where a message is
another module's, that module is asked, which then raises."""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from groupwise.config import BUILTIN, MODEL_PREFIX, TRAINED_REWARD_MODEL, Job
from groupwise.data.rows import read_rows
from groupwise.disk import PARTIAL, is_stream
from groupwise.errors import ConfigError, DataError, ModelError, RunFolderError
from groupwise.jobfile import load_job, recipe_names
from groupwise.jobfile.load import parse_override
from groupwise.jobfile.reward_model import RewardModelJob
from groupwise.rewards.functions.workers import Worker
from groupwise.store.folder import RunFolder
from groupwise.tokenizer.files import looks_local
from groupwise.wiring.python_objects import PYTHON_PREFIX

WHICH = ("latest", "best", "base")
"""A run's weights: of the last checkpoint, of the best evaluation, or as they were before training."""
EXPORTED = ("auto", "float32", "bfloat16", "float16")
"""Types that a model is exported in; auto is one that keeps what was learned."""
_OF_TRAINING = ("train", "checkpoint", "watch")
"""Sections of a job that nothing but training reads."""
_WHOLE = 10_000_000
"""Bytes up to which a JSON file, which can only be read as a whole, is read twice."""


def check_job(job: Job, functions: bool = True) -> None:
    """Refuse a job whose model, data or, where they are needed, functions are not there. Raises GroupwiseError."""
    check_model(job.model.path)
    if functions:
        check_functions(job.reward.functions, "reward function")
        check_functions(job.reward.step_functions, "step reward function", stepwise=True)
        check_functions(job.reward.verifier, "reward function")
        check_functions([job.process.function] if job.process.function else [], "segmenter", stepwise=True)
    check_prompts(job.data.path, job.data.prompt_column)
    if job.eval.data is not None:
        check_prompts(job.eval.data, job.data.prompt_column)


def check_reward_model_job(job: RewardModelJob) -> None:
    """The same for the training of a reward model."""
    check_model(job.model)
    for path in (job.data, job.eval_data):
        if path is not None and not path.startswith(PYTHON_PREFIX):
            first_row(path)


def check_new_run(run: str) -> None:
    """Refuse a folder that cannot take a new run. Raises RunFolderError."""
    RunFolder.free(Path(run))


def check_resume(run: str, overrides: Sequence[str], fork: str | None) -> None:
    """Refuse a run that is none, keys that no job has, and a folder that cannot take a fork. Raises GroupwiseError."""
    folder = RunFolder.open(Path(run))
    check_model(load_job(folder.job, overrides).job.model.path)
    if fork is not None:
        check_new_run(fork)


def check_eval(target: str, which: str, overrides: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse what cannot be evaluated. Raises GroupwiseError."""
    job = check_target(target, which, overrides, options)
    _check_judges(job)
    if job.eval.data is not None:
        check_prompts(job.eval.data, job.data.prompt_column)


def check_label(target: str | None, which: str, overrides: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse what cannot be labelled. Raises GroupwiseError."""
    job = _job(None, overrides, options) if target is None else check_target(target, which, overrides, options)
    check_model(job.model.path)
    _check_judges(job)
    check_prompts(job.data.path, job.data.prompt_column)


def check_export(run: str, target: str, which: str, dtype: str = "auto") -> None:
    """Refuse a run that is none, a type that is none, and a folder that is taken. Raises GroupwiseError."""
    if dtype not in EXPORTED:
        raise ConfigError(f"There is no type {dtype!r} to export in: name {', '.join(EXPORTED)}.")
    RunFolder.open(Path(run))
    check_target(run, which)
    if Path(target).is_dir() and any(path.name != PARTIAL for path in Path(target).iterdir()):
        raise RunFolderError(f"{target} is not empty. Choose another folder to export to.")


def check_target(
    target: str, which: str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> Job:
    """Refuse a run folder, job or recipe that is none, weights that it cannot have, and a model that is not there.

    Returns the job. Raises GroupwiseError.
    """
    check_weights(target, which)
    check_overrides(overrides)
    path = Path(target)
    in_run = path.is_dir()
    folder = RunFolder.open(path) if in_run else RunFolder(path)
    job = _job(folder.job if in_run else target, overrides, options)
    if in_run and which != "base" and not any(folder.checkpoints.glob("*/")):
        raise RunFolderError(f"{target} has no checkpoint yet. Its model before training is --which base.")
    check_model(job.model.path)
    return job


def _job(source: str | Path | None, overrides: Sequence[str], options: Mapping[str, Any] | None) -> Job:
    return load_job(source, overrides, options, training=False).job


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse `--set` keys of sections that only training reads. Raises ConfigError."""
    for text in overrides:
        key, _ = parse_override(text)
        if (section := key.partition(".")[0]) in _OF_TRAINING:
            raise ConfigError(
                f"--set {text}: `{key}` has no effect here, since [{section}] says how a run is trained. Leave it out, "
                "or give it to `groupwise train` or `resume`."
            )


def check_weights(target: str | None, which: str) -> None:
    """Refuse a target that is neither run, job nor recipe (None is the embedded job), and weights that it cannot have.

    Raises ConfigError."""
    if which not in WHICH:
        raise ConfigError(f"There are no weights called {which!r}: name {', '.join(WHICH)}.")
    if target is not None and not Path(target).exists() and target not in recipe_names():
        raise ConfigError(f"{target} is no run folder, no job file and no recipe ({', '.join(recipe_names())}).")
    if which == "best" and (target is None or not Path(target).is_dir()):
        raise ConfigError(f"{target or 'The embedded job'} is a job and no run, so it has no best weights.")


def _check_judges(job: Job) -> None:
    check_functions(job.reward.verifier or job.reward.functions, "reward function")
    check_functions(job.reward.step_functions, "step reward function", stepwise=True)


def check_model(path: str) -> None:
    """Refuse a folder that is not there, or is none of a model. Raises ModelError."""
    folder = Path(path)
    if path in (BUILTIN, TRAINED_REWARD_MODEL) or (not folder.exists() and not looks_local(path)):
        return
    if not folder.is_dir():
        raise ModelError(f"The model {path} is no folder: give an existing folder, or a hub id as 'org/name'.")
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        way = "It holds no model: there is no config.json in it. Give a Hugging Face folder, or a hub id as 'org/name'."
        if (folder / "job.toml").is_file():
            way = f"It is a run: write its weights as a model with `groupwise export {path} DIR`, and name that folder."
        raise ModelError(f"The model {path} cannot be loaded. {way}")


def check_prompts(path: str, column: str) -> None:
    """Refuse prompts that are not there, or whose first row is none. Raises DataError."""
    if path == BUILTIN or path.startswith(PYTHON_PREFIX):
        return
    row = first_row(path)
    if row is not None and column not in row:
        columns = ", ".join(map(repr, row)) or "none at all"
        raise DataError(
            f"{path}, row 0 (counted from 0) has no column {column!r}; it has {columns}. Set data.prompt_column to the "
            "right one."
        )


def first_row(path: str) -> Mapping[str, Any] | None:
    """The first row of a file, or the names of its columns; None where that takes more than a look.

    Raises DataError where there is no such file, or nothing to read in it.
    """
    file = Path(path)
    if is_stream(file):
        read_rows(path)  # says that it cannot be read twice
    if (file.exists() and not file.is_file()) or not (file.exists() or looks_local(path) or file.suffix in _LOOKS):
        return None  # a folder, or an id of the hub
    found: Mapping[str, Any] | None = {}
    with contextlib.suppress(KeyError, OSError, ValueError, csv.Error):
        found = _LOOKS[file.suffix.lower()](file)
    if found == {}:
        read_rows(path)  # says what is wrong; or nothing is, which a look did not see
        return None
    return found


def _first_line(file: Path) -> Any:
    with file.open("rb") as lines:
        line = next((line for line in lines if line.strip()), b"{}")
    found = json.loads(line.decode("utf-8-sig"))
    return found if isinstance(found, dict) else {}


def _first_item(file: Path) -> Any:
    if file.stat().st_size > _WHOLE:
        return None
    found = json.loads(file.read_bytes().decode("utf-8-sig"))
    items = found.get("data") if isinstance(found, dict) else found
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def _header(file: Path) -> Any:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return dict.fromkeys(next(csv.reader(lines), ()))


def _columns(file: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return dict.fromkeys(parquet.read_schema(file).names)
    except pyarrow.ArrowException:
        return {}


_LOOKS: Mapping[str, Callable[[Path], Any]] = {
    ".jsonl": _first_line,
    ".json": _first_item,
    ".csv": _header,
    ".parquet": _columns,
}


def check_functions(specs: Sequence[str], kind: str, stepwise: bool = False) -> None:
    """Refuse functions of files that are not there or do not define them, and reward models that are no folders.

    The file is parsed, not run. Where it seems to be wrong it is loaded, as a run would: that decides, and says why.
    Raises RewardError or ModelError.
    """
    for spec in specs:
        if spec.startswith(MODEL_PREFIX):
            path = spec.removeprefix(MODEL_PREFIX)
            trained = Path(path) / "model"  # of a run of `reward-model train`
            check_model(str(trained) if trained.is_dir() else path)
        elif (
            spec != TRAINED_REWARD_MODEL and not spec.startswith((PYTHON_PREFIX, "builtin:")) and not _seems_right(spec)
        ):
            Worker(spec, kind=kind, stepwise=stepwise).close()


def _seems_right(spec: str) -> bool:
    place, _, name = spec.rpartition(":")
    if not place.endswith(".py"):
        package = place.partition(".")[0]
        try:
            return any(Path.cwd().glob(f"{package}*")) or importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):
            return False
    try:
        tree = ast.parse(Path(place).expanduser().read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    names = set(_bound(tree))
    return name.partition(".")[0] in names or not names.isdisjoint({"*", "globals", "setattr", "__getattr__"})


def _bound(tree: ast.Module) -> Iterator[str]:
    """The names that a file may bind at its top, and those by which it may bind others unseen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
