"""Makes a shape's folder: random weights and a tokenizer of words. `python -m benchmarks.shapes SHAPE FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import SEED, SHAPES

CONTEXT = 4096
DONE = ".finished"


def save(name: str, folder: Path) -> None:
    """Write the model in float32 and, in `tokenizer/`, its tokenizer; a finished folder is left alone."""
    if (folder / DONE).exists():
        return
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = SHAPES[name]
    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(SEED)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    _tokenizer(shape.vocabulary).save_pretrained(folder / "tokenizer")
    (folder / DONE).touch()


def tokenizer_of(folder: Path, **options: Any) -> Any:
    """The tokenizer of a shape's folder, by its own class: beside a Qwen2, AutoTokenizer would make another of it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", **options)


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *(f"w{index}" for index in range(2, vocabulary))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
