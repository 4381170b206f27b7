"""The doctor: a healthy job passes, and each planted fault is found by the check that is there for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import normalizers
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import groupwise
from groupwise.config import ProcessSection, RewardSection
from groupwise.data.files import PromptSet
from groupwise.demo.model import character_tokenizer
from groupwise.diagnosis import doctor, inputs
from groupwise.diagnosis.findings import Finding, Report, measured, print_report
from groupwise.diagnosis.numbers import Bounds, bounds
from groupwise.diagnosis.opened_job import FreeMemory, OpenedJob, open_job
from groupwise.engines.native.engine import NativeEngine
from groupwise.jobfile import load_job
from groupwise.learn import learner as learning
from groupwise.learn.reference import Reference
from groupwise.models.attention import ForestAttention, Options
from groupwise.models.head import HeadShape
from groupwise.tokenizer.codec import Codec
from groupwise.types import Prompt
from groupwise.wiring import memory
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.scoring import open_functions, scorer_of
from groupwise.wiring.settings import objective_of
from tests.commandline import call
from tests.run.tiny import ALPHABET, save_model, save_rewards, save_rows
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level

ROWS = [{"prompt": prompt, "want": "a"} for prompt in ("ab", "c\nd ef", "gh a", "b", "abcdefgh")]
OPTIONS: dict[str, Any] = {
    "num_generations": 4, "max_completion_length": 12, "temperature": 0.7, "prompts_per_step": 2, "steps": 2,
    "device": "cpu",
}  # fmt: skip
EVERY = {
    "tokenizer", "end token", "chat template", "shared = plain, log-probs", "shared = plain, gradient",
    "micro-batches", "order", "chunked head, log-probs", "chunked head, gradient", "ratio 1 at step 0",
    "KL 0 at step 0", "sampler = trainer, mean", "sampler = trainer, worst", "rewards", "memory",
}  # fmt: skip
SHARED = {"shared = plain, log-probs", "shared = plain, gradient"}
SAMPLER = {"sampler = trainer, mean", "sampler = trainer, worst"}
HEAD = {"chunked head, log-probs", "chunked head, gradient"}
Plant = Callable[[OpenedJob, pytest.MonkeyPatch], OpenedJob]


def share(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    return [text.count("a") / max(1, len(text)) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def opened_job(folder: Path, closing: ExitStack, reward: Callable[..., Any] = share, **more: Any) -> OpenedJob:
    options = {"model": folder, "data": "python:rows", "reward": "python:share", **OPTIONS, **more}
    return open_job(load_job(None, (), options).job, PythonObjects([reward], ROWS), lambda _: None, closing)


@pytest.fixture(scope="module")
def kept(folder: Path) -> Iterator[OpenedJob]:
    """One patient for the whole module: the checks change nothing in it."""
    with ExitStack() as closing:
        yield opened_job(folder, closing)


@pytest.fixture
def opened(kept: OpenedJob) -> OpenedJob:
    """The same, with nothing sampled yet."""
    return replace(kept, warnings=[])


def verdicts(report: Report) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in report.findings}


def failed(report: Report) -> set[str]:
    return {name for name, verdict in verdicts(report).items() if verdict == "failed"}


def the(report: Report, check: str) -> Finding:
    return next(finding for finding in report.findings if finding.check == check)


def test_a_healthy_job_passes_and_nothing_is_left_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = groupwise.doctor(model=folder, data=ROWS, reward=share, **OPTIONS)
    assert report.healthy
    assert verdicts(report) == {name: "not used" if name == "chat template" else "passed" for name in EVERY}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr()
    assert said.out == ""
    assert "checking: order" in said.err


def test_no_weight_is_moved(opened: OpenedJob) -> None:
    def weights() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in opened.learner.master_weights().items()}

    before = weights()
    doctor.run_checks(opened)
    after = weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "more, unused",
    [({"layout": "plain", "beta": 0.0}, {*SHARED, "KL 0 at step 0"}), ({"dtype": "bfloat16", "preset": "rloo"}, set())],
    ids=["plain, no reference", "bfloat16, penalty in the reward"],
)
def test_other_healthy_jobs_pass(folder: Path, more: dict[str, Any], unused: set[str]) -> None:
    with ExitStack() as closing:
        report = doctor.run_checks(opened_job(folder, closing, **more))
    assert failed(report) == set()
    first = {name.partition(",")[0] for name in unused}
    assert {name for name, verdict in verdicts(report).items() if verdict == "not used"} == first | {"chat template"}
    if "layout" in more:
        assert "as asked" in the(report, "shared = plain").words


def test_a_head_that_is_no_matrix_is_not_compared(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as closing:
        plain = opened_job(Path(opened.model.source), closing, layout="plain")
        monkeypatch.setattr(plain.learner.policy, "head", None)
        report = doctor.run_checks(plain)
    assert failed(report) == set()
    assert the(report, "chunked head").verdict == "not used"


def leak(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    """Every token of a stream sees a little of all the others."""
    attend = ForestAttention.attend

    def leaking(self: Any, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        seen = value.mean(0).repeat_interleave(query.shape[1] // value.shape[1], 0)
        return attend(self, layer, query, key, value, options) + 0.2 * seen

    monkeypatch.setattr(ForestAttention, "attend", leaking)
    return opened


def normalise_each_part(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    """Each micro-batch is a mean of its own."""
    losses = learning.token_losses

    def wrong(*positional: Any, **named: Any) -> Any:
        found = losses(*positional, **named)
        return replace(found, loss_T=found.loss_T / len(found.loss_T))

    monkeypatch.setattr(learning, "token_losses", wrong)
    return opened


def weigh_by_place(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    """What comes later in the batch weighs more."""
    weights = learning.token_weights

    def wrong(*positional: Any, **named: Any) -> Tensor:
        found = weights(*positional, **named)
        return found * torch.linspace(1, 2, len(found))

    monkeypatch.setattr(learning, "token_weights", wrong)
    return opened


def wrong_scale(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    return with_head(HeadShape(scale=1.2), opened, monkeypatch)


def wrong_cap(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    return with_head(HeadShape(softcap=1.0), opened, monkeypatch)


def with_head(shape: HeadShape, opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    """What is wrong is so for policy and reference alike, as it would be after a probe that erred."""
    assert isinstance(opened.learner.reference, Reference)
    for policy in (opened.learner.policy, opened.learner.reference.policy):
        monkeypatch.setattr(policy, "head", shape)
    return opened


def stale_sampler(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    """The engine has weights of its own, and what it is given does not arrive."""
    engine = NativeEngine(noisy(copy.deepcopy(opened.learner.policy)), opened.model.codec)
    monkeypatch.setattr(engine, "load_weights", lambda weights, version, **options: None)
    return replace(opened, engine=engine)


def without_temperature(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    submit = opened.engine.submit
    monkeypatch.setattr(
        opened.engine, "submit",
        lambda request: submit(replace(request, sampling=replace(request.sampling, temperature=1.0))),
    )  # fmt: skip
    return opened


def another_reference(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    reference = Reference(opened.learner.policy)
    noisy(reference.policy)
    monkeypatch.setattr(opened.learner, "reference", reference)
    return opened


def drifting_old(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    """Old log-probs are those of slightly other weights; the learner's other answers are right."""
    prepare = opened.learner.prepare

    def wrong(*positional: Any) -> Any:
        batch = prepare(*positional)
        return replace(batch, old_logprobs_T=None if batch.old_logprobs_T is None else batch.old_logprobs_T + 0.01)

    monkeypatch.setattr(opened.learner, "prepare", wrong)
    return opened


def dropped_newlines(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    return replace(opened, model=replace(opened.model, codec=Codec(tokenizer)))


def masked_end(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> OpenedJob:
    """Pad is the end token, and what is padding by its id is left out of the loss."""
    pack, opened = opened.learner.pack, pad_is_end(opened)
    end = opened.model.codec.tokenizer.eos_token_id

    def wrong(*positional: Any) -> Any:
        batch = pack(*positional)
        ids_T = torch.tensor([token for output in batch.outputs for token in output.token_ids])
        return replace(batch, trained_T=batch.trained_T & (ids_T != end))

    monkeypatch.setattr(opened.learner, "pack", wrong)
    return opened


def pad_is_end(opened: OpenedJob) -> OpenedJob:
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.pad_token = tokenizer.eos_token
    return replace(opened, model=replace(opened.model, codec=Codec(tokenizer)))


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.mark.parametrize(
    "plant, expected",
    [
        (leak, {*SHARED, *SAMPLER, "micro-batches", "order"}),
        (normalise_each_part, {"micro-batches", "order"}),
        (weigh_by_place, {"order"}),
        (wrong_scale, HEAD),
        (wrong_cap, HEAD),
        (stale_sampler, SAMPLER),
        (without_temperature, SAMPLER),
        (another_reference, {"KL 0 at step 0"}),
        (drifting_old, {"ratio 1 at step 0"}),
        (dropped_newlines, {"tokenizer"}),
        (masked_end, {"end token"}),
    ],
)
def test_a_planted_fault_is_found(
    plant: Plant, expected: set[str], opened: OpenedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = doctor.run_checks(plant(opened, monkeypatch))
    assert failed(report) == expected
    assert all(the(report, name).words for name in expected)


def test_the_wide_bounds_of_bfloat16_still_find_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as closing:
        ill = normalise_each_part(opened_job(folder, closing, dtype="bfloat16"), monkeypatch)
        assert failed(doctor.run_checks(ill)) == {"micro-batches", "order"}


def test_a_window_that_is_ignored_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer(ALPHABET)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=3, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    attend = ForestAttention.attend

    def without_window(self: Any, layer: int, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        return attend(self, layer, q, k, v, Options(options.scale, None, options.softcap, options.sinks))

    with ExitStack() as closing:
        windowed = opened_job(tmp_path, closing)
        assert failed(doctor.run_checks(windowed)) == set()
        monkeypatch.setattr(ForestAttention, "attend", without_window)
        assert failed(doctor.run_checks(replace(windowed))) >= SHARED


def test_a_pad_that_is_the_end_token_is_trained(opened: OpenedJob) -> None:
    [finding] = inputs.end_token(pad_is_end(opened))
    assert finding.verdict == "passed"
    assert "trained all the same" in finding.words


def test_a_model_without_end_tokens_is_a_warning(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened.model.codec, "end_token_ids", frozenset())
    assert [finding.verdict for finding in inputs.end_token(opened)] == ["warning"]


OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
DATED = "{{ strftime_now('%c') }}"
ONCE = "{{ range(99999) | random }}{{ range(99999) | random }}"
TWO_BOS = "<bos><bos>" + CHAT_TEMPLATE
MISTRAL = "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + '<end>' }}{% endfor %}"
THINKING = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")


@pytest.mark.parametrize(
    "template, fault",
    [
        (CHAT_TEMPLATE, ""),
        (DATED + CHAT_TEMPLATE, ""),
        (MISTRAL, ""),
        (THINKING, ""),
        ("<bos>" + CHAT_TEMPLATE, ""),
        (TWO_BOS, "two BOS"),
        (CHAT_TEMPLATE.replace(OPEN, ""), "where the assistant begins"),
        (ONCE + CHAT_TEMPLATE, "differently the second time"),
    ],
)
@pytest.mark.parametrize("prefilled", [False, True])
def test_chat_templates(template: str, fault: str, prefilled: bool, opened: OpenedJob) -> None:
    codec = Codec(byte_level(template))
    messages = [{"role": "user", "content": "add 1"}]
    messages += [{"role": "assistant", "content": "the answer"}] if prefilled else []
    prompt = Prompt("0", messages, codec.encode_prompt(messages))
    ill = replace(opened, model=replace(opened.model, codec=codec), prompts=PromptSet((prompt, prompt), 0))
    [finding] = inputs.chat_template(ill)
    if prefilled and "assistant" in fault:
        fault = ""  # nobody needs a generation prompt there
    assert finding.verdict == ("failed" if fault else "passed")
    assert fault in finding.words


def nan(prompts: Any, completions: Any, **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


def nothing(prompts: Any, completions: Any, **_: Any) -> list[None]:
    return [None] * len(completions)


def raising(prompts: Any, completions: Any, **_: Any) -> list[float]:
    raise ValueError("no answer column")


def flat(prompts: Any, completions: Any, **_: Any) -> list[float]:
    return [1.0] * len(completions)


def some(prompts: Any, completions: Any, **_: Any) -> list[float | None]:
    return [None, *range(1, len(completions))]


@pytest.mark.parametrize(
    "reward, verdict, said",
    [
        (nan, "failed", "nan, which is not finite"),
        (nothing, "failed", "scored nothing"),
        (raising, "failed", "no answer column"),
        (flat, "warning", "nothing is learned"),
        (some, "warning", "not scored: 6.2%"),
        (share, "passed", "not scored: 0%"),
    ],
)
def test_rewards(reward: Callable[..., Any], verdict: str, said: str, opened: OpenedJob) -> None:
    with ExitStack() as closing:
        functions = open_functions(opened.job, PythonObjects([reward]), None, closing)
        scorer = scorer_of(opened.job, functions, opened.model.codec, opened.warnings.append)
        [finding] = doctor._tried("rewards", inputs.rewards, replace(opened, scorer=scorer))
    assert finding.verdict == verdict
    assert said in finding.words


def ones(steps: Any, **_: Any) -> list[list[float]]:
    return [[1.0] * len(output) for output in steps]


def lengths(steps: Any, **_: Any) -> list[list[float]]:
    return [[float(len(step)) for step in output] for output in steps]


def no_steps(steps: Any, **_: Any) -> list[None]:
    return [None for _ in steps]


@pytest.mark.parametrize(
    "reward, pattern, verdict, said",
    [
        (lengths, "[a-h]", "passed", "not scored: 0%"),
        (ones, "[a-h]", "warning", "nothing is learned"),
        (lengths, "Z", "warning", "found no boundary in any output"),
        (no_steps, "[a-h]", "failed", "of the steps scored nothing"),
    ],
)
def test_step_rewards(reward: Callable[..., Any], pattern: str, verdict: str, said: str, opened: OpenedJob) -> None:
    scoring = RewardSection(functions=[], step_functions=["python:f"])
    process = ProcessSection(segmenter="pattern", pattern=pattern)
    job = opened.job.model_copy(update={"reward": scoring, "process": process})
    with ExitStack() as closing:
        functions = open_functions(job, PythonObjects(step_rewards=[reward]), None, closing)
        scorer = scorer_of(job, functions, opened.model.codec, opened.warnings.append)
        learner = copy.copy(opened.learner)
        learner.objective = objective_of(job)
        [finding] = doctor._tried("rewards", inputs.rewards, replace(opened, scorer=scorer, learner=learner))
    assert finding.verdict == verdict
    assert said in finding.words


@pytest.mark.parametrize("peak, verdict", [(80, "passed"), (95, "warning"), (101, "failed")])
def test_memory_of_an_update(peak: int, verdict: str, opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "peak_memory", lambda device: 50 + peak)
    [finding] = inputs.memory(replace(opened, room=FreeMemory(free=100, held=50)))
    assert (finding.verdict, finding.error, finding.bound) == (verdict, peak, 100)
    assert ("Lower train.tokens_per_micro_batch" in finding.words) == (verdict != "passed")


def test_an_update_that_runs_out_of_memory(opened: OpenedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(batch: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(opened.learner, "update", out_of_memory)
    settings = opened.learner.settings
    [finding] = inputs.memory(opened)
    assert finding.verdict == "failed"
    assert "Lower train.tokens_per_micro_batch" in finding.words
    assert opened.learner.settings is settings


def test_the_update_of_the_memory_check_is_a_full_one(opened: OpenedJob) -> None:
    groups = inputs._largest(opened)
    assert [len(group.group.prompt.token_ids) for group in groups] == [8, 8]  # two prompts a step, the longest each
    assert [len(c.token_ids) for group in groups for c in group.group.completions] == [12] * 8
    job = opened.job.model_copy(update={"train": opened.job.train.model_copy(update={"tokens_per_micro_batch": 60})})
    assert len(inputs._largest(replace(opened, job=job))) == 1  # 8 + 4 * 12 tokens fill it


def test_weights_that_do_not_fit_are_the_only_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    report = groupwise.doctor(model=folder, data=ROWS, reward=share, **OPTIONS)
    assert failed(report) == {"memory"}
    assert report.count("not used") == len(report.findings) - 1
    assert "does not fit" in the(report, "memory").words


def test_a_check_that_crashes_has_failed_and_the_others_go_on(
    opened: OpenedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(groups: Any) -> Any:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(opened.learner.policy, "stream", broken)
    report = doctor.run_checks(opened)
    assert {name for name, _ in doctor.CHECKS} >= failed(report) >= {"shared = plain", "order", "memory"}
    assert the(report, "order").words == "ZeroDivisionError: of all things."
    assert verdicts(report)["tokenizer"] == verdicts(report)["rewards"] == "passed"


def test_a_number_that_is_none_never_passes() -> None:
    assert measured("a", float("nan"), 1.0).verdict == "failed"
    assert measured("a", 1.0, 1.0).verdict == "passed"
    assert measured("a", 1.01, 1.0, words="two", fault="three").words == "two. three"


def test_cast_types_have_wide_bounds() -> None:
    assert bounds(torch.float32) == Bounds(token=1e-3, mean=1e-4, gradient=1e-3)
    assert bounds(torch.bfloat16) == Bounds(token=1.0, mean=0.05, gradient=0.15)


def test_the_report_as_a_table_and_as_json() -> None:
    findings = (
        Finding("order", "passed", 1.234e-7, 1e-3),
        Finding("memory", "failed", 2.5e9, 1e9, "bytes", "too much [of it]"),
        Finding("head", "not used"),
        Finding("ratio", "failed", float("nan"), 1e-3),
    )
    report = Report(findings)
    console = Console(record=True, width=100)
    print_report(report, console)
    lines = console.export_text().splitlines()
    assert lines[1].split() == ["order", "1.23e-07", "0.00100", "passed"]
    assert lines[2].split() == ["memory", "2.5", "GB", "1.0", "GB", "failed", "too", "much", "[of", "it]"]
    assert lines[-1].startswith("1 checks passed, 2 failed (1 not used): memory, ratio. Do not train")
    loaded = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (loaded["passed"], loaded["failed"], len(loaded["findings"])) == (1, 2, 4)
    assert loaded["findings"][3]["error"] is None


def test_on_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_rows(tmp_path / "rows.jsonl", ROWS)
    save_rewards(tmp_path / "rewards.py", "def none(prompts, completions, **kwargs): return [None] * len(prompts)\n")
    knobs = ["sampling.num_generations=2", "sampling.max_completion_length=4", "model.device=cpu"]
    arguments = ["doctor", "--model", folder, "--data", "rows.jsonl", *(p for knob in knobs for p in ("--set", knob))]
    ended = call(*arguments, "--reward", "rewards.py:none", "--json")
    assert ended.status == 1
    assert [one["check"] for one in json.loads(ended.out)["findings"] if one["verdict"] == "failed"] == ["rewards"]
    save_rewards(tmp_path / "rewards.py", "def length(prompt, completion): return float(len(completion))\n")
    ended = call(*arguments, "--reward", "rewards.py:length")
    assert ended.status == 0
    assert " 0 failed" in ended.out.splitlines()[-1]
    refused = call(*arguments, "--reward", "rewards.py")
    assert refused.status == 2
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"rewards.py", "rows.jsonl"}


def test_what_there_is_to_say_of_prompts_is_in_the_table(opened: OpenedJob) -> None:
    def finding(content: Any) -> Finding:
        codec = Codec(byte_level(CHAT_TEMPLATE))
        prompt = Prompt("0", content, codec.encode_prompt(content))
        ill = replace(opened, model=replace(opened.model, codec=codec), prompts=PromptSet((prompt,), 0))
        [found] = inputs.chat_template(ill)
        return found

    text = finding("1+1?")
    assert text.verdict == "warning"
    assert "data.chat = true" in text.words
    answered = finding([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])
    assert answered.verdict == "passed", "a prefill is nothing wrong"
    assert "data.drop_answer" in answered.words
