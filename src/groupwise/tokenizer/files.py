"""The files of a tokenizer: loading them from a folder or the hub, reading end tokens beside them, copying them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from groupwise.errors import ModelError
from groupwise.tokenizer.hub import NOT_HERE, check_within_reach
from groupwise.wording import one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_TEMPLATES: Final = ("chat_template*", "additional_chat_templates/*")
"""The files of a tokenizer that are of no use alone."""
TOKENIZER_FILES: Final = (
    *("tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*", "*.tiktoken", "tekken.json", *_TEMPLATES),
)
"""What a tokenizer may consist of in a Hugging Face folder."""
_VOCABULARIES: Final = "tokenizer.json, tokenizer.model, vocab.json with merges.txt, spiece.model, tekken.json"
"""Where the usual tokenizers keep their tokens, in words."""
CONFIG_FILES: Final = ("generation_config.json", "config.json")
"""What names end tokens beside the tokenizer itself."""


def load_tokenizer(path: str | Path, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """AutoTokenizer for a folder or hub id; raises ModelError, one paragraph, for whatever keeps it from loading."""
    from transformers import AutoTokenizer

    if (looks_local(path) or Path(path).exists()) and not Path(path).is_dir():
        raise ModelError(
            f"{str(path)!r} is no folder with a model: give an existing folder, or a hub id as 'org/name'."
        )
    check_within_reach(path, revision, f"The tokenizer of {str(path)!r}")
    advice = NOT_HERE
    if Path(path).is_dir():
        if not _holds_any(Path(path)):
            raise _no_tokenizer(path)
        advice = "The folder needs a tokenizer.json, or what the model's own tokenizer class reads."
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the loader and the hub raise OSError, ValueError, ImportError and plain Exception
        raise ModelError(f"The tokenizer of {str(path)!r} cannot be loaded: {one_line(error)} {advice}") from error
    # Some classes make do with special tokens alone, and lose every text.
    if set(tokenizer.get_vocab()) <= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}:
        raise _no_tokenizer(path)
    return tokenizer


def _holds_any(folder: Path) -> bool:
    """Whether a folder has any file of a tokenizer, templates aside."""
    return any(True for pattern in TOKENIZER_FILES if pattern not in _TEMPLATES for _ in folder.glob(pattern))


def _no_tokenizer(path: str | Path) -> ModelError:
    where = f"The folder {str(path)!r}" if Path(path).is_dir() else f"The model {str(path)!r}"
    return ModelError(
        f"{where} has no tokenizer: none of the files that hold a vocabulary is there ({_VOCABULARIES}). Put the "
        "tokenizer's files beside the weights, those of the model that they came from; in Python: "
        "AutoTokenizer.from_pretrained(that_model).save_pretrained(folder)."
    )


def source_folder(path: str | Path, revision: str | None) -> Path | None:
    """The folder that holds the tokenizer's files: the model's own, or the hub's snapshot in the cache."""
    if Path(path).is_dir():
        return Path(path).absolute()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder = None
    for name in (*CONFIG_FILES, "tokenizer.json"):
        try:
            folder = Path(hf_hub_download(str(path), name, revision=revision)).parent
        except EntryNotFoundError:  # no model has to have all of them
            continue
    return folder


def configured_end_ids(folder: Path | None) -> frozenset[int]:
    """The end tokens that generation_config.json and config.json name; raises ModelError where one is no JSON."""
    files = [] if folder is None else [folder / name for name in CONFIG_FILES]
    found: set[int] = set()
    for file in files:
        if not file.is_file():
            continue
        try:
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read: {one_line(error)}") from error
        for section in (config, config.get("text_config") or {}):
            ends = section.get("eos_token_id")
            found |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return frozenset(found)


def own_tokenizer(folder: Path | None) -> Tokenizer | None:
    """What tokenizer.json itself says, without AutoTokenizer's opinion; None where there is no such file."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()  # some files were saved with the settings of their last call
    tokenizer.no_padding()
    return tokenizer


def copy_tokenizer(folder: Path | None, directory: Path) -> bool:
    """Copy the tokenizer's files into `directory`; False where the folder is unknown or has none."""
    if folder is None:
        return False
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(files):
        target = directory / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)
    return bool(files)


def looks_local(path: str | Path) -> bool:
    """Whether a path is meant as one on this machine: hub ids have at most one slash and start with a name."""
    return isinstance(path, Path) or path.startswith((".", "/", "~", "\\")) or path.count("/") > 1


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of a tokenizer's special tokens: those that it names, and those that its files mark as special."""
    marked = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *marked))
