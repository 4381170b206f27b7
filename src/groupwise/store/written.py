"""A model as a Hugging Face folder: written whole or not at all, and read back before it takes its place."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from groupwise.disk import PARTIAL, cannot_write, os_error, put_in_place, sync
from groupwise.errors import ModelError, RunFolderError
from groupwise.models.attention import ATTENTION_NAME
from groupwise.models.clone import tiny_clone
from groupwise.models.load import quiet_transformers
from groupwise.tokenizer.codec import Codec
from groupwise.wording import one_line, shown

GENERATION: Final = "generation_config.json"
SMALL: Final = 30_000_000
"""Parameters up to which the folder's own model is read back and compared; beyond, small clones are."""
TOLERANCE: Final = 1e-3
"""Largest difference of log-probs in float32 between a model and what its folder is read back as."""
_WHOLE: Final = 0.9
"""Share of a change from which on a narrower type is said to keep it."""
_PIECE: Final = 1 << 24


class Rounding:
    """How much of what training changed in the weights is left in a narrower type: the projection of the rounded
    change on the change itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._left, self._whole = dtype, 0.0, 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count one tensor, as it was and as it is."""
        for old, new in zip(before.flatten().split(_PIECE), after.flatten().split(_PIECE), strict=True):
            start = old.double()
            change = new.to(start.device).double() - start
            left = new.to(start.device).to(self.dtype).double() - start
            self._left += float((left * change).sum())
            self._whole += float((change * change).sum())

    @property
    def share(self) -> float | None:
        """The share that is left; None where nothing changed."""
        return self._left / self._whole if self._whole else None

    @property
    def keeps_most(self) -> bool:
        """Whether the type may be used without losing much."""
        return self.share is None or self.share >= _WHOLE


def write_folder(
    model: PreTrainedModel, codec: Codec, target: Path, *, source: str, dtype: torch.dtype, card: str,
    also: Callable[[Path], None] = lambda folder: None, replace: bool = False,
) -> None:  # fmt: skip
    """Write a model as a Hugging Face folder in `dtype`, to which the model is cast, and read it back.

    It is written beside its place and then renamed. Tokenizer files and the generation config are copied as they came;
    `also` writes what else belongs there. `replace`: an older folder gives way. Raises RunFolderError where `target` is
    not an empty or new folder, or cannot be written, and ModelError where the folder is not read back as the model.
    """
    inside = target.is_mount()  # what is mounted cannot be renamed
    partial = target / PARTIAL if inside else target.with_name(f".{target.name}{PARTIAL}")
    try:
        if not replace and target.exists() and any(path != partial for path in target.iterdir()):
            raise RunFolderError(f"{target} is not empty. Choose another folder to export to.")
        if partial.exists():
            shutil.rmtree(partial)  # an earlier one that was killed
        partial.mkdir(parents=True)
        _write(model, codec, partial, source=source, dtype=dtype)
        (partial / "README.md").write_text(card, encoding="utf-8")
        also(partial)
        read_back(model, partial)
        for path in partial.rglob("*"):
            sync(path)
        _empty_into(partial, target) if inside else put_in_place(partial, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    except Exception as error:
        # Named boundary: the libraries that write weights and tokenizers hide the system's error in a sentence.
        if (found := os_error(error, target)) is None:
            raise
        raise cannot_write(target, found) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(model: PreTrainedModel, codec: Codec, folder: Path, *, source: str, dtype: torch.dtype) -> None:
    tied = _is_tied(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if dtype != torch.float32 and not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name} has numbers that {_name(dtype)} has no room for. Choose another type: float32.")
    for config in (model.config, model.config.get_text_config()):
        if tied is not None and getattr(config, "tie_word_embeddings", tied) != tied:
            config.tie_word_embeddings = tied
    model.config.dtype = dtype
    model.save_pretrained(folder)
    _write_config(model.config, folder / "config.json", _name(dtype))
    if (Path(source) / GENERATION).is_file():
        shutil.copyfile(Path(source) / GENERATION, folder / GENERATION)
    codec.save(folder)


def _is_tied(model: PreTrainedModel) -> bool | None:
    """Whether the head is the embeddings' matrix; None for a model that has no such two."""
    into, out = (
        getattr(part, "weight", None) for part in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if not (isinstance(into, Tensor) and isinstance(out, Tensor)):
        return None
    return into is out or into.data_ptr() == out.data_ptr()


def _write_config(config: PreTrainedConfig, path: Path, dtype: str) -> None:
    """The configuration, with keys for transformers before 5 where those after it read the same with them."""
    values = json.loads(path.read_text(encoding="utf-8")) | {"dtype": dtype, "torch_dtype": dtype}
    expected = _plain(type(config).from_dict(config.to_dict()))
    different = ""
    for more in (older_rope_keys(values), {}):
        path.write_text(json.dumps(values | more, indent=2) + "\n", encoding="utf-8")
        different = _difference(config, path.parent, expected)
        if not different:
            return
    raise _not_read_back(different)


def _difference(config: PreTrainedConfig, folder: Path, expected: Mapping[str, Any]) -> str:
    """What the folder's configuration says otherwise; empty where nothing."""
    try:
        with quiet_transformers():
            found = _plain(type(config).from_pretrained(folder))
    except Exception as error:  # noqa: BLE001 - a boundary: whatever a class raises, it cannot be read
        return f"config.json cannot be read: {one_line(error, 300)}"
    names = [name for name in expected if found.get(name) != expected[name]]
    return "; ".join(f"{n} is {shown(found.get(n))} in place of {shown(expected[n])}" for n in names[:3])


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says, without what depends on where and by what it was read."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    apart = ("transformers_version", "dtype", "torch_dtype")
    return {name: value for name, value in values.items() if name not in apart and not name.startswith("_")}


def older_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys by which transformers before 5 reads what `rope_parameters` says; without them it takes its default."""
    parameters = config.get("rope_parameters")
    if not parameters:
        return {}
    by_type = {k: v for k, v in parameters.items() if isinstance(v, dict)}
    main = by_type.get("full_attention", next(iter(by_type.values()))) if by_type else parameters
    keys: dict[str, Any] = {}
    if "rope_theta" in main:
        keys["rope_theta"] = main["rope_theta"]
    if "rope_theta" in by_type.get("sliding_attention", {}):
        keys["rope_local_base_freq"] = by_type["sliding_attention"]["rope_theta"]
    if main.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {k: v for k, v in main.items() if k != "rope_theta"}
    return keys


def read_back(model: PreTrainedModel, folder: Path) -> None:
    """Compare a folder with the model that it was written from: its weights are whole, and log-probs of a row are the
    same, by the folder's model where it is small, else by small clones. Raises ModelError."""
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):  # which compares the file's size with what it says to hold
                pass
        except SafetensorError as error:
            raise _not_read_back(f"{file.name} is not whole: {one_line(error)}") from error
    if sum(parameter.numel() for parameter in model.parameters()) <= SMALL:
        # A name of ours would need what training hands to the forward.
        own = model.config._attn_implementation
        attention = "eager" if own == ATTENTION_NAME else own
        expected = _logprobs(_with_attention(copy.deepcopy(model), attention))
        found = _logprobs(_loaded(type(model), folder, attention))
    elif (clone := _clone(model.config)) is None:
        return  # as large as the model: its configuration was compared
    else:
        expected = _logprobs(clone)
        if (other := _clone(type(model.config).from_pretrained(folder))) is None:
            raise _not_read_back("no small clone can be made of its configuration")
        found = _logprobs(other)
    worst = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    if not worst <= TOLERANCE:
        raise _not_read_back(f"its log-probs are off by {worst:.3g}")


def _loaded(kind: type[PreTrainedModel], folder: Path, attention: str | None) -> PreTrainedModel:
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with quiet_transformers():
            loaded: Any = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    except Exception as error:
        # Named boundary: whatever a class raises, its folder cannot be read.
        raise _not_read_back(f"it cannot be loaded: {one_line(error, 300)}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise _not_read_back(f"it lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}")
    return model  # type: ignore[no-any-return]


def _with_attention(model: PreTrainedModel, attention: str | None) -> PreTrainedModel:
    if attention is not None and attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    return model


def _clone(config: PreTrainedConfig) -> PreTrainedModel | None:
    try:
        with quiet_transformers():
            return tiny_clone(config)
    except Exception:  # noqa: BLE001 - a boundary: of some classes there is no small one
        return None


@torch.no_grad()
def _logprobs(model: PreTrainedModel) -> Tensor:
    """Of one row, in float32 on the CPU; where there is no next token, the logits themselves."""
    model = model.float().eval()
    model = torch.nn.Module.to(model, "cpu")
    last = int(model.config.get_text_config().vocab_size) - 1
    judges = model.get_output_embeddings() is None
    # Some causal classes cannot make a cache of a few layers; classifiers may not know the word.
    options = {} if judges else {"use_cache": False}
    logits = model(input_ids=torch.linspace(0, last, 12).long()[None], **options).logits.float()
    return logits if judges else torch.log_softmax(logits, -1)


def _not_read_back(what: str) -> ModelError:
    return ModelError(
        f"What was written is not read back as the model: {what}. It was removed again, and the run is as it was. This "
        "is a fault of groupwise or of transformers with this class of models."
    )


def _empty_into(partial: Path, target: Path) -> None:
    """Move every file, the one without which nothing takes it for a model last."""
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    sync(target)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
