"""Reward models: Hugging Face classifiers over texts, loaded to score or to be trained, and their forward pass.

Outcome: `AutoModelForSequenceClassification` with one label, whose logit is the score. Process:
`AutoModelForTokenClassification` with two, or a causal model that says one of two words after each step."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from groupwise.disk import write_atomic
from groupwise.errors import DataError, ModelError
from groupwise.models.cast import cast_to_compute_dtype
from groupwise.models.load import (
    choose_device,
    context_length,
    load_config,
    quiet_transformers,
    read_weights,
    source_dtype,
)
from groupwise.models.policy import silence_dropout
from groupwise.models.size import parameter_count
from groupwise.precision import wide
from groupwise.reward_models.text import Encoder, Judged, OutputEncoder, Row, StepEncoder, TagEncoder, Tags
from groupwise.tokenizer.codec import Codec
from groupwise.tokenizer.files import special_ids
from groupwise.wording import one_line

Kind = Literal["outcome", "process"]
CARD: Final = "reward_model.json"
"""Stands beside the weights: what a Hugging Face folder has no place for."""
SEPARATOR: Final = "\n"
"""What TRL's stepwise trainer puts after a step unless it is told otherwise."""

_CLASSES: Final[dict[str, tuple[Any, str, int]]] = {
    "outcome": (AutoModelForSequenceClassification, "ForSequenceClassification", 1),
    "process": (AutoModelForTokenClassification, "ForTokenClassification", 2),
}
_NAMED: Final = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "deberta-v2", "modernbert")
"""Backbones that people know; a message names those that have the class."""


@dataclass(frozen=True)
class Source:
    """Where a reward model comes from, whether code in its folder may run, and what day its template is told it is."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    date: str | None = None


class RewardModel:
    """A classifier with its tokenizer, which judges outputs or steps. Dropout is off, in training too.

    `version` counts its rounds of training; 0 was never trained here. `limit` is the longest row in tokens,
    `stored_dtype` what its source was stored in. `remark` is what whoever uses it should be told, or nothing.
    """

    def __init__(
        self, model: PreTrainedModel, codec: Codec, kind: Kind, encoder: Encoder, *, source: str, version: int = 0,
        limit: int | None = None, stored_dtype: torch.dtype = torch.float32, remark: str = "",
    ) -> None:  # fmt: skip
        self.model, self.codec, self.kind, self.encoder = model.eval(), codec, kind, encoder
        self.source, self.version, self.limit, self.stored_dtype = source, version, limit, stored_dtype
        self.remark, self._special = remark, special_ids(codec.tokenizer)
        self._plain = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        silence_dropout(model)
        self._takes_padding = True
        self._takes_padding = self._is_unmoved_by_padding()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def encode(self, judged: Judged) -> Row:
        """The row of an output or of steps. Raises DataError where it is too long, empty, or refused."""
        row = self.encoder(judged)
        if not row.token_ids:
            raise DataError("There is nothing to judge: prompt and output become no token at all.")
        if self.limit is not None and len(row.token_ids) > self.limit:
            raise DataError(f"Prompt and output have {len(row.token_ids)} tokens, and at most {self.limit} fit.")
        return row

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """One number per row, or per step of the rows in their order: the raw logit of an output, the log-odds of a
        right step. With gradient; in float32 or wider.

        An output is scored at the last token of its row. Stock classes look for it by comparing with the padding, so
        rows are padded with a token that none of them has, also where the model's own padding is an end token.
        """
        pad = self._padding(rows)
        if len(rows) > 1 and (pad is None or not self._takes_padding):
            return torch.cat([self.logits([row]) for row in rows])
        ids, mask = self._padded(rows, pad or 0)
        config = self.model.config.get_text_config()
        own, config.pad_token_id = config.pad_token_id, pad
        try:
            found = self.model(input_ids=ids, attention_mask=mask, **self._plain).logits
        finally:
            config.pad_token_id = own
        if self.kind == "outcome":
            return wide(found)[:, 0]
        row_K = torch.tensor([index for index, row in enumerate(rows) for _ in row.places], dtype=torch.long)
        place_K = torch.tensor([place for row in rows for place in row.places], dtype=torch.long)
        wrong, right = self.encoder.verdicts if isinstance(self.encoder, TagEncoder) else (0, 1)
        picked = wide(found[row_K, place_K][:, [wrong, right]])
        return picked[:, 1] - picked[:, 0]

    def _padding(self, rows: Sequence[Row]) -> int | None:
        """A token to pad with that no row has: the model's own, or an ordinary one; None where rows have every one."""
        text, taken = self.model.config.get_text_config(), {token for row in rows for token in row.token_ids}
        own: int | None = text.pad_token_id
        if own is not None and own not in taken and own not in self.codec.end_token_ids:
            return own
        taken |= self._special  # which a class may look for, as BART's does for the end token
        return next((token for token in range(int(text.vocab_size)) if token not in taken), None)

    @torch.no_grad()
    def _is_unmoved_by_padding(self) -> bool:
        """Whether a short row scores beside a long one as it does alone: some classes look at the end of the padding.

        Raises ModelError where the class cannot compute such rows at all.
        """
        ids = sorted(self.codec.tokenizer.get_vocab().values())
        words = [token for token in ids if token not in self._special][:8]
        end = self.codec.tokenizer.eos_token_id
        tokens = [(*words[:length], *([] if end is None else [end])) for length in (2, 8)]
        short, long = (Row(found, (len(found) - 1,) if self.kind == "process" else ()) for found in tokens)
        try:
            return torch.allclose(self.logits([short, long])[:1], self.logits([short]), rtol=1e-3, atol=1e-5)
        except Exception as error:
            # Named boundary: whatever a class raises, it is of no use as a reward model.
            name = type(self.model).__name__
            raise ModelError(f"{self.source} ({name}) cannot score rows of text: {one_line(error, 300)}") from error

    def _padded(self, rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor]:
        """Rows side by side, filled up at their right ends, and which of their tokens are their own."""
        longest = max(len(row.token_ids) for row in rows)
        ids = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
            mask[index, : len(row.token_ids)] = 1
        return ids.to(self.device), mask.to(self.device)

    def write_card(self, folder: Path) -> None:
        """Write beside saved weights what loading them needs."""
        card: dict[str, Any] = {"kind": self.kind, "version": self.version}
        if isinstance(self.encoder, StepEncoder):
            card["separator"] = self.encoder.separator
        write_atomic(folder / CARD, json.dumps(card, ensure_ascii=False, indent=2) + "\n")


def load_reward_model(
    source: Source, kind: Kind, *, device: str = "auto", dtype: torch.dtype = torch.float32, tags: Tags | None = None
) -> RewardModel:
    """A reward model to score with. A run folder of `groupwise reward-model train` stands for its `model` folder.

    `tags` make a causal model a process reward model. Raises ModelError where the model is of another kind, has
    another number of labels, or lacks the weights of its head.
    """
    source = _resolved(source)
    config = load_config(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    tagged = kind == "process" and tags is not None and not _is_of(config, kind)
    if not tagged:
        _check_kind(source.path, config, kind)
    auto = AutoModelForCausalLM if tagged else _CLASSES[kind][0]
    with quiet_transformers():
        model, missing, _ = read_weights(auto, source.path, source.revision, source.trust_remote_code)
    if missing:
        raise ModelError(
            f"{source.path} lacks {len(missing)} of the reward model's weights ({', '.join(missing[:3])}): it would "
            "score by random numbers. Train it first: groupwise reward-model train."
        )
    codec = _codec(source, model)
    card = _card(source)
    encoder: Encoder = OutputEncoder(codec)
    if kind == "process":
        encoder = TagEncoder(codec, tags) if tagged and tags else StepEncoder(codec, card.get("separator", SEPARATOR))
    nn.Module.to(model, choose_device(device)).requires_grad_(False)
    limit, version = context_length(model.config), int(card.get("version", 0))
    remark = "" if tagged or card else _remark(source.path, model, codec, kind)
    made = RewardModel(model, codec, kind, encoder, source=source.path, version=version, limit=limit, remark=remark)
    cast_to_compute_dtype(model, dtype)
    return made


def parameters_of(source: Source, kind: Kind) -> int:
    """Parameters of a reward model, or of one that a backbone becomes, told without its weights. Raises ModelError."""
    source = _resolved(source)
    config = load_config(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    auto = _CLASSES[kind][0]
    if type(config) not in auto._model_mapping:  # one that says a word after each step, perhaps
        auto = AutoModelForCausalLM
    return parameter_count(config, source.trust_remote_code, auto)


def _resolved(source: Source) -> Source:
    """A run folder of `groupwise reward-model train` stands for its `model` folder."""
    inner = Path(source.path) / "model"
    if (inner / "config.json").is_file() and not (Path(source.path) / "config.json").is_file():
        return replace(source, path=str(inner), revision=None)
    return source


def new_reward_model(
    source: Source, kind: Kind, *, seed: int = 0, separator: str | None = None, device: str = "auto",
    max_length: int | None = None, has_head: bool = False,
) -> RewardModel:  # fmt: skip
    """A reward model to be trained, in float32: a backbone with a new head, or one that has its head already.

    `seed` decides the new head; with `has_head` there has to be one. `separator` follows each step (default: as
    stored, else a line break). Raises ModelError where the backbone lacks the class, or has a head of another number
    of labels.
    """
    config = load_config(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    _check_backbone(source.path, config, kind)
    auto, _, labels = _CLASSES[kind]
    if has_head or _is_of(config, kind):
        _check_kind(source.path, config, kind)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing, _ = read_weights(
            auto, source.path, source.revision, source.trust_remote_code, num_labels=labels
        )
    body = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name]
    if body:
        raise ModelError(
            f"{source.path} lacks {len(body)} of the backbone's weights ({', '.join(body[:3])}): training would start "
            "from random numbers. Is it whole?"
        )
    codec = _codec(source, model)
    card = _card(source)
    remark = _remark(source.path, model, codec, kind) if _is_of(config, kind) and not card else ""
    model.config.get_text_config().pad_token_id = _padding_apart(model, codec)
    separator = card.get("separator", SEPARATOR) if separator is None else separator
    encoder: Encoder = OutputEncoder(codec) if kind == "outcome" else StepEncoder(codec, separator)
    limits = [limit for limit in (max_length, context_length(config)) if limit is not None]
    nn.Module.to(model, choose_device(device))
    return RewardModel(
        model, codec, kind, encoder, source=source.path,
        version=int(card.get("version", 0)), limit=min(limits, default=None), stored_dtype=source_dtype(config),
        remark=remark,
    )  # fmt: skip


def _padding_apart(model: PreTrainedModel, codec: Codec) -> int | None:
    """The padding that is stored with a model: a stock class takes a row's last token that is not padding for its last
    one, so a token that ends rows cannot be it. None where there is no other: then stock classes take one row alone."""
    known = (model.config.get_text_config().pad_token_id, codec.tokenizer.pad_token_id)
    ends = codec.end_token_ids | OutputEncoder(codec).last_tokens()
    return next((int(token) for token in known if token is not None and token not in ends), None)


def _remark(path: str, model: PreTrainedModel, codec: Codec, kind: Kind) -> str:
    """What is worth knowing about a model that others trained, whose padding is a token that rows end with."""
    pad = model.config.get_text_config().pad_token_id
    if kind != "outcome" or pad not in codec.end_token_ids | OutputEncoder(codec).last_tokens():
        return ""
    return (
        f"{path} names as padding the token that its rows end with ({pad}), which stock classes pass over; here an "
        "output is scored at its last token, the end token included. If it was trained otherwise, scores may be off"
    )


def _is_of(config: PreTrainedConfig, kind: Kind) -> bool:
    """Whether a folder holds a model of this kind's class, as far as its config says."""
    return any(name.endswith(_CLASSES[kind][1]) for name in config.architectures or ())


def _check_kind(path: str, config: PreTrainedConfig, kind: Kind) -> None:
    _, wanted, labels = _CLASSES[kind]
    found = ", ".join(config.architectures or ()) or "of no stated class"
    other: Kind = "process" if kind == "outcome" else "outcome"
    if not _is_of(config, kind):
        advice = "Train one from it: groupwise reward-model train."
        if _is_of(config, other):
            option = "--reward" if other == "outcome" else "--step-reward"
            advice = f"It is a reward model of kind {other}: name it with {option}."
        elif kind == "process" and found.endswith(("ForCausalLM", "LMHeadModel")):
            advice += " If it was trained to say a word after each step, set reward.step_tags to [tag, right, wrong]."
        raise ModelError(f"{path} is {found}, and a reward model of kind {kind} is ...{wanted}. {advice}")
    if config.num_labels != labels:
        raise ModelError(
            f"{path} has num_labels {config.num_labels}, and a reward model of kind {kind} has {labels}: it was made "
            "for something else."
        )


def _check_backbone(path: str, config: PreTrainedConfig, kind: Kind) -> None:
    """Raise ModelError unless transformers has the class that `kind` needs for this backbone."""
    auto, wanted, _ = _CLASSES[kind]
    known = auto._model_mapping
    if type(config) in known or f"AutoModel{wanted}" in (getattr(config, "auto_map", None) or {}):
        return
    names = {one.model_type for one in known}
    works = ", ".join(name for name in _NAMED if name in names)
    raise ModelError(
        f"{path} is a {config.model_type}, for which transformers has no ...{wanted}, and a reward model of kind "
        f"{kind} is one. Backbones that work: {works}."
    )


def _codec(source: Source, model: PreTrainedModel) -> Codec:
    codec = Codec.load(
        source.path, revision=source.revision, trust_remote_code=source.trust_remote_code, date=source.date
    )
    rows = int(model.config.get_text_config().vocab_size)
    if codec.vocab_size > rows:
        raise ModelError(
            f"The tokenizer of {source.path} knows {codec.vocab_size} tokens, the model has rows for {rows}: they do "
            "not belong together. Take the tokenizer that it was trained with."
        )
    return codec


def _card(source: Source) -> dict[str, Any]:
    """What stands beside the weights; nothing in public models."""
    path = Path(source.path) / CARD
    if not Path(source.path).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(source.path, CARD, revision=source.revision))
        except EntryNotFoundError:  # not there, or not reached and not in the cache
            return {}
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"version": int(found["version"]), "separator": str(found.get("separator", SEPARATOR))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
