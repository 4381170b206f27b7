"""The command line. Each command is a few lines around `groupwise.commands.api`; heavy imports wait until one runs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groupwise import __version__
from groupwise.commands import inputs
from groupwise.commands.asking import messages_of, only_one
from groupwise.cpu.malloc import own_process
from groupwise.errors import ConfigError, GroupwiseError
from groupwise.jobfile import at_home, json_schema, load_job, read_once, template
from groupwise.jobfile import show as show_job
from groupwise.jobfile.load import meant_as_keys
from groupwise.jobfile.reward_model import is_reward_model_run, load_reward_job
from groupwise.streams import Output, kept

if TYPE_CHECKING:
    from groupwise.watch.terminal import Mode

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Group Relative Policy Optimization for language models.",
)  # fmt: skip

reward_models = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Reward models: train one.")
app.add_typer(reward_models, name="reward-model")

JobFile = Annotated[
    str | None, typer.Argument(metavar="JOB", help="A job file or a recipe's name.", callback=read_once)
]
Target = Annotated[
    str, typer.Argument(metavar="RUN|JOB", help="A run folder, a job file or a recipe's name.", callback=read_once)
]
AnyJob = Annotated[
    str | None, typer.Argument(metavar="RUN|JOB", help="A run, a job file or a recipe's name.", callback=read_once)
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="The run folder.", callback=at_home)]
Model = Annotated[str | None, typer.Option(metavar="DIR|ID", help="A Hugging Face folder or hub id.")]
Data = Annotated[
    str | None,
    typer.Option(metavar="FILE|DIR|ID", help="Prompts: .jsonl, .json, .csv, .parquet, a datasets folder or hub id."),
]
EvalData = Annotated[str | None, typer.Option(metavar="FILE|DIR|ID", help="Held-out prompts, as --data takes them.")]
Rewards = Annotated[
    list[str] | None, typer.Option("--reward", metavar="FILE.PY:NAME|model:DIR", help="May be given repeatedly.")
]
StepRewards = Annotated[
    list[str] | None, typer.Option("--step-reward", metavar="FILE.PY:NAME|model:DIR", help="Scores steps; repeatable.")
]
Run = Annotated[str | None, typer.Option(metavar="DIR", help="The run folder.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, as in train.steps=10.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only warnings and the last line.")]
Json = Annotated[bool, typer.Option("--json", help="Each event as a line of JSON, and nothing else.")]
JsonResult = Annotated[bool, typer.Option("--json", help="As JSON.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")]
Which = Annotated[str, typer.Option(metavar="WHICH", help="Which weights: latest, best or base.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"groupwise {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")]


@app.callback()
def _main(version: Version = False) -> None:
    """Group Relative Policy Optimization for language models."""


@app.command()
def train(
    job: JobFile = None, model: Model = None, data: Data = None, reward: Rewards = None,
    step_reward: StepRewards = None, eval_data: EvalData = None, run: Run = None, set_: Sets = None,
    quiet: Quiet = False, json_: Json = False, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Train a model; without arguments, the embedded job."""
    # What cannot run is refused at once, not after the seconds that torch takes to be imported.
    options = _options(model, data, reward, step_reward, eval_data, run)
    checked = load_job(job, set_ or (), options).job
    mode = _mode(quiet, json_)
    inputs.check_new_run(checked.run)
    inputs.check_job(checked)
    from groupwise.commands import api

    result = api.train(job, **options, overrides=set_ or (), show=mode, trust_remote_code=trust_remote_code)
    _exit(result.stopped_by)


@app.command()
def resume(
    run: RunFolder, set_: Sets = None,
    fork: Annotated[str | None, typer.Option(metavar="DIR", help="Start a new run from the checkpoint.")] = None,
    quiet: Quiet = False, json_: Json = False, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Continue a run exactly where it was interrupted."""
    if is_reward_model_run(Path(run)):
        if fork:
            raise ConfigError(f"{run} trains a reward model, which is not forked: start a new run with its --model.")
        from groupwise.commands import reward_training

        given = reward_training.RewardData(trust_remote_code=trust_remote_code)
        found = reward_training.resume_reward_model(run, overrides=set_ or (), given=given, show=_mode(quiet, json_))
        _exit(found.stopped_by)
        return
    mode = _mode(quiet, json_)
    inputs.check_resume(run, set_ or (), fork)
    from groupwise.commands import api

    result = api.resume(run, overrides=set_ or (), fork=fork, show=mode, trust_remote_code=trust_remote_code)
    _exit(result.stopped_by)


@app.command("eval")
def evaluate(
    target: Target, which: Which = "latest", data: EvalData = None, reward: Rewards = None,
    step_reward: StepRewards = None, set_: Sets = None, json_: JsonResult = False, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Evaluate weights: mean reward, accuracy, pass@k, intervals."""
    options: dict[str, Any] = {"eval_data": data, "reward": reward or None, "step_reward": step_reward or None}
    inputs.check_eval(target, which, set_ or (), options)
    from groupwise.commands import api
    from groupwise.watch.terminal import eval_table

    found = api.evaluate(target, overrides=set_ or (), which=which, **options, trust_remote_code=trust_remote_code)
    typer.echo(json.dumps(found) if json_ else eval_table(found))


@app.command()
def sample(
    target: Target,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="A text, or - for standard input.")] = None,
    messages: Annotated[str | None, typer.Option(metavar="FILE", help="A conversation in JSON, or - .")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without a template.")] = False,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="How many outputs.")] = 1,
    temperature: Annotated[float | None, typer.Option(metavar="T", min=0, help="Default: as in evaluation.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Decides the draws.")] = 0,
    which: Which = "latest", set_: Sets = None, json_: JsonResult = False, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Continue a prompt, or answer it, with a run's weights."""
    inputs.check_target(target, which, set_ or ())
    content = only_one(prompt, None if messages is None else messages_of(messages, _standard_input))
    content = _standard_input() if content == "-" else content
    from groupwise.commands import api

    outputs = api.sample(
        target, content, raw=raw, system=system, n=n, temperature=temperature, seed=seed, which=which,
        overrides=set_ or (), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if json_:
        for output in outputs:
            typer.echo(json.dumps({"text": output.text, "tokens": len(output.token_ids), "finish": output.finish}))
    else:
        typer.echo("\n---\n".join(output.text for output in outputs))


def _standard_input() -> str:
    if sys.stdin is None:
        raise ConfigError("The prompt is - for standard input, which is closed. Give it as an argument.")
    return sys.stdin.read()


@app.command()
def label(
    target: AnyJob = None,
    output: Annotated[str, typer.Option(metavar="FILE.jsonl", help="Where to write; goes on with what is there.")] = "",
    model: Model = None, data: Data = None, reward: Rewards = None,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Continuations from the end of each step.")] = 8,
    soft: Annotated[bool, typer.Option("--soft", help="The share that is right; otherwise whether any is.")] = False,
    pattern: Annotated[str | None, typer.Option(metavar="REGEX", help="What steps end with, for [process].")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first so many prompts.")] = None,
    which: Annotated[str, typer.Option(metavar="WHICH", help="A run's weights: base, latest or best.")] = "base",
    set_: Sets = None, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Label the steps of outputs by Monte Carlo, to train a PRM."""
    if not output:
        raise ConfigError("Name the file that labels go to, as in --output labels.jsonl.")
    options: dict[str, Any] = {"model": model, "data": data, "reward": reward or None}
    inputs.check_label(target, which, set_ or (), options)
    from groupwise.commands import api

    found = api.label(
        target, output=output, **options, n=n, soft=soft, pattern=pattern, limit=limit, which=which,
        overrides=set_ or (), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    out = f" ({found.left_out:,} left out)" if found.left_out else ""
    typer.echo(f"{found.output}: {found.outputs:,} outputs{out}, {found.steps:,} steps, {found.right:,} of them right")
    _exit(found.stopped_by)


@app.command()
def export(
    run: RunFolder, folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to write: new or empty.")],
    which: Which = "latest",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="float32, bfloat16, float16, or auto: one that keeps what was learned.")
    ] = "auto",
    trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Write a run's weights as a Hugging Face folder."""
    inputs.check_export(run, folder, which, dtype)
    from groupwise.commands import api

    written = api.export(run, folder, which=which, dtype=dtype, trust_remote_code=trust_remote_code)
    typer.echo(f"exported to {written}")


@app.command()
def show(
    job: AnyJob = None,
    model: Model = None, data: Data = None, reward: Rewards = None,
    step_reward: StepRewards = None, eval_data: EvalData = None, run: Run = None, set_: Sets = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of job files instead.")] = False,
) -> None:  # fmt: skip
    """Print a job as it would run, and where each value came from."""
    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    if job is not None and Path(job).is_dir():
        job = str(Path(job) / "job.toml")
    options = _options(model, data, reward, step_reward, eval_data, run)
    typer.echo(show_job(load_job(job, set_ or (), options)))


@app.command()
def doctor(
    job: JobFile = None, model: Model = None, data: Data = None, reward: Rewards = None,
    step_reward: StepRewards = None, eval_data: EvalData = None, set_: Sets = None,
    json_: JsonResult = False, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Try on a job what the library promises. The exit status is 1 where something fails."""
    options = _options(model, data, reward, step_reward, eval_data)
    inputs.check_job(load_job(job, set_ or (), options).job)
    from groupwise.commands import api
    from groupwise.diagnosis.findings import print_report

    report = api.doctor(job, **options, overrides=set_ or (), trust_remote_code=trust_remote_code)
    if json_:
        typer.echo(json.dumps(report.as_dict()))
    else:
        print_report(report)
    if not report.healthy:
        raise typer.Exit(1)


@app.command()
def plan(
    job: AnyJob = None,
    model: Model = None, data: Data = None, reward: Rewards = None,
    step_reward: StepRewards = None, eval_data: EvalData = None, run: Run = None, set_: Sets = None,
    json_: JsonResult = False, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Tell before weights are read what a job will take."""
    if job is not None and Path(job).is_dir():
        job = str(Path(job) / "job.toml")
    options = _options(model, data, reward, step_reward, eval_data, run)
    inputs.check_job(load_job(job, set_ or (), options).job, functions=False)
    from groupwise.commands import api
    from groupwise.planning.plan import in_text

    found = api.plan(job, **options, overrides=set_ or (), trust_remote_code=trust_remote_code)
    typer.echo(json.dumps(found.as_dict()) if json_ else in_text(found))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write.")] = Path("job.toml"),
    model: Model = None, data: Data = None, reward: Rewards = None,
    step_reward: StepRewards = None, eval_data: EvalData = None, run: Run = None,
) -> None:  # fmt: skip
    """Write a commented job file to start from."""
    text = template(str(path), _options(model, data, reward, step_reward, eval_data, run))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"The job file {path} cannot be written: {error.strerror}. Name another one.") from error
    typer.echo(f"wrote {path}; edit it, look at it with `groupwise show {path}`, run it with `groupwise train {path}`")


@reward_models.callback()
def _reward_model() -> None:
    """Reward models."""


@reward_models.command("train")
def train_reward_model(
    kind: Annotated[str | None, typer.Option(metavar="outcome|process", help="Scores outputs, or steps.")] = None,
    model: Model = None,
    data: Annotated[str | None, typer.Option(metavar="FILE|DIR|ID", help="Examples in TRL's columns.")] = None,
    eval_data: Annotated[str | None, typer.Option(metavar="FILE|DIR|ID", help="Held-out examples.")] = None,
    run: Run = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in epochs=2.")] = None,
    quiet: Quiet = False, json_: Json = False, trust_remote_code: Trust = False,
) -> None:  # fmt: skip
    """Train a reward model on labels or preferences."""
    options = {"kind": kind, "model": model, "data": data, "eval_data": eval_data, "run": run}
    job = load_reward_job(options, set_ or ())
    inputs.check_new_run(job.run)
    inputs.check_reward_model_job(job)
    from groupwise.commands import reward_training

    given = reward_training.RewardData(trust_remote_code=trust_remote_code)
    _exit(reward_training.train_reward_model(job, given=given, show=_mode(quiet, json_)).stopped_by)


def _options(
    model: str | None, data: str | None, reward: list[str] | None, step_reward: list[str] | None,
    eval_data: str | None, run: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What commands have in common, as `load_job` and `groupwise.commands.api` take it: None was not given."""
    given = {"model": model, "data": data, "reward": reward or None, "step_reward": step_reward or None}
    return given | {"eval_data": eval_data} | ({} if run is None else {"run": run})


def _mode(quiet: bool, json_: bool) -> Mode:
    if quiet and json_:
        raise ConfigError("--quiet and --json cannot go together: --json already prints nothing but events.")
    return "quiet" if quiet else "json" if json_ else "auto"


def _exit(stopped_by: int | None) -> None:
    if stopped_by is not None:
        raise typer.Exit(128 + stopped_by)


_SPINS = {True: 10_000, False: 1_000}
"""How often threads look for new work before they sleep. By default it is so often that one busy core beside us makes
training 16 times slower; seldom, that is twice, and small steps on an idle machine take a fifth longer (LOG.md)."""


def _is_idle() -> bool:
    """Whether nobody else has been computing here for the last minute, as far as the system tells."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] < 0.5


def main() -> None:
    """Run the command line; errors that a user can mend end with one paragraph and status 2.

    Where standard output is lost the status says so: 0 or that of the run where a run goes on without the reader who
    has gone, 1 where its output could not be written, 141 (as by SIGPIPE) where a command's reader has gone, and 2
    where a command's output could not be written.
    """
    own_process()
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS[_is_idle()]))  # read when torch is first imported
    with kept() as (out, _):
        status = _status()
        out.flush()
        if status == 0 and out.lost is not None:
            status = _status_without(out)
    sys.exit(status)


def _status() -> int:
    try:
        app(prog_name="groupwise")
    except GroupwiseError as error:
        typer.echo(_sentences(f"groupwise: {error}", *getattr(error, "__notes__", ())), err=True)
        return 2
    except SystemExit as ended:
        if ended.code == 2:
            commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]  # it is a group
            options = {name for command in commands for one in command.params for name in one.opts}
            for sentence in meant_as_keys(sys.argv[1:], options):
                typer.echo(f"groupwise: {sentence}", err=True)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _sentences(*said: str) -> str:
    """What is said one after the other: a traceback ends with its line, and a sentence with a full stop."""
    whole = said[0]
    for more in said[1:]:
        whole += f"\n{more}" if "\n" in whole else f" {more}" if whole[-1:] in ".!?" else f". {more}"
    return whole


def _status_without(out: Output) -> int:
    """The exit status of a command that went well, but for what it wrote to `out`."""
    if out.left:
        return 128 + signal.SIGPIPE if out.is_all else 0
    if not out.is_all:
        return 1  # the terminal has said it
    advice = "Send it to a file on a disk with room, or to another program."
    typer.echo(f"groupwise: Cannot write to {out.name}: {out.lost}. {advice}", err=True)
    return 2
