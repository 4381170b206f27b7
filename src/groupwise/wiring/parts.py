"""From a job to the objects that the loop works with: the one place that maps names to classes."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

from groupwise.config import Job
from groupwise.data.remarks import in_both
from groupwise.data.stream import PromptStream
from groupwise.engines.mailbox import Mailbox, Sampler
from groupwise.learn.learner import PolicyLearner
from groupwise.progress import Progress
from groupwise.reward_models.rounds import NoRounds, Rounds
from groupwise.rewards.patience import Patience
from groupwise.rewards.scorer import Scorer
from groupwise.run.evaluate import Evaluation, NoEvaluation, Schedule
from groupwise.run.guarded import GuardedSampler
from groupwise.run.loop import Parts
from groupwise.run.rollouts import GroupSampler, Rollouts
from groupwise.run.saving import Best, Clock, RunState, Saver
from groupwise.store.events import EventsFile, RolloutsFile
from groupwise.store.folder import RunFolder
from groupwise.watch.record import Recorder
from groupwise.wiring.engines import open_engine, open_guard
from groupwise.wiring.models import Model, model_source, open_model
from groupwise.wiring.prompts import check_prompts, held_out_prompts, training_prompts
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.reward_models import open_trained
from groupwise.wiring.rounds import Opened, open_rounds, placed
from groupwise.wiring.scoring import as_judged, check_thread, open_functions, say_unread, scorer_of
from groupwise.wiring.settings import (
    eval_sampling_of,
    learner_settings,
    objective_of,
    sampling_of,
    total_steps,
    trains_reward_model,
)


def open_evaluation(
    job: Job, model: Model, objects: PythonObjects, sampler: Sampler, scorer: Scorer
) -> Evaluation | NoEvaluation:
    """Held-out evaluation, or its stand-in where the job names no data for it."""
    held_out = held_out_prompts(job, model, objects)
    if held_out is None:
        return NoEvaluation()
    if held_out.dropped_long:
        scorer.warn(f"{held_out.dropped_long} held-out prompts are too long and were left out")
    draw = GroupSampler(eval_sampling_of(job), job.eval.num_generations, job.seed, "eval")
    schedule = Schedule(job.eval.every, total_steps(job))
    return Evaluation(
        held_out.prompts, sampler, scorer, draw, schedule, job.eval.threshold, verified=bool(job.reward.verifier)
    )


def open_sinks(watch: Recorder, job: Job, folder: RunFolder, last_step: int | None, closing: ExitStack) -> None:
    """Give `watch` its files: events and rollouts, after those of `last_step` where a run is resumed."""
    closing.callback(watch.close)
    watch.sinks.append(EventsFile(folder.events))
    if job.watch.tensorboard:
        from groupwise.watch.tensorboard import TensorBoardSink

        watch.sinks.append(TensorBoardSink(folder.tensorboard, last_step))
    watch.rollouts = RolloutsFile(folder.rollouts, job.watch.rollouts_max_bytes) if job.watch.rollouts else None


def build(
    job: Job, folder: RunFolder, objects: PythonObjects, watch: Recorder, clock: Clock, closing: ExitStack
) -> tuple[Parts, Saver]:
    """Everything the loop needs, and what saves and restores it; what holds something is closed by `closing`.

    What is quick to refuse is opened first.
    """
    objective, warn = objective_of(job), watch.terminal.warn
    trained = cache(lambda: open_trained(job, model_source(job, watch.terminal.say), objects))
    functions = open_functions(job, objects, folder, closing, trained)
    judged, judged_given = as_judged(job, objects)
    judges = functions if judged is job else open_functions(judged, judged_given, folder, closing)
    model = open_model(job, objects, watch.terminal.say, training=True)
    patience = Patience(job.reward.patience, total_steps(job))
    scorer = scorer_of(job, functions, model.codec, warn, patience)
    judge = scorer_of(judged, judges, model.codec, warn, patience)
    check_thread(objects, warn)
    prompts = training_prompts(job, model, objects)
    check_prompts(prompts, model.codec, warn)
    say_unread(job, prompts.prompts, (functions, judges), watch.terminal.say)
    mailbox, guard = Mailbox(open_engine(job, model, closing)), open_guard(job, model, warn)
    evaluation = open_evaluation(job, model, objects, GuardedSampler(mailbox, guard, "In held-out outputs"), judge)
    if isinstance(evaluation, Evaluation) and (known := in_both(prompts.prompts, evaluation.prompts)):
        warn(known)
    learner = PolicyLearner(model.loaded.policy, objective, learner_settings(job, model.loaded.compute_dtype), guard)
    stream = PromptStream(prompts.prompts, seed=job.seed, shuffle=job.data.shuffle)
    draw = GroupSampler(sampling_of(job), job.sampling.num_generations, job.seed, "train")
    progress = Progress(job.train.iterations, job.train.steps)
    for one in (scorer, judge):
        one.follow(stream, job.train.prompts_per_step)
    rounds: Rounds = NoRounds()
    verifier: Scorer | None = None
    if trains_reward_model(job):
        first = GuardedSampler(mailbox, guard, "In outputs for the reward model")
        if job.reward.verifier:
            verifier = Scorer(judges.rewards, None, total_steps(job), warn, patience=patience)
            verifier.follow(stream, job.train.prompts_per_step)
        rounds = open_rounds(
            Opened(placed(job), objects, folder, watch, model, prompts.prompts, first, progress), trained(), verifier,
            functions.segmenter,
        )  # fmt: skip
    rollouts = Rollouts(stream, mailbox, scorer, draw, job.train.prompts_per_step, prompts.dropped_long)
    best = Best(folder, evaluation, learner, kept=job.checkpoint.best)
    state = RunState(
        {
            "learner": learner, "progress": progress, "rollouts": rollouts, "patience": patience,
            "evaluation": evaluation, "rounds": rounds, "clock": clock, "best": best,
        }
    )  # fmt: skip
    saver = Saver(
        folder, job.checkpoint, state, watch, progress=progress, clock=clock, learner=learner, rounds=rounds, best=best
    )
    parts = Parts(
        progress=progress,
        rollouts=rollouts,
        objective=objective,
        learner=learner,
        rounds=rounds,
        evaluation=evaluation,
        checkpoints=saver,
        watch=watch,
        num_iterations=job.train.num_iterations,
    )
    return parts, saver
