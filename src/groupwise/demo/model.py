"""Small models and character tokenizers, built in code as ordinary Hugging Face objects."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, END = "<pad>", "<end>"
PAD_ID, END_ID = 0, 1


def character_tokenizer(alphabet: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `alphabet`, after `<pad>` (0) and `<end>` (1).

    A character outside the alphabet raises when it is encoded: nothing is dropped in silence.
    """
    tokens = [PAD, END, *dict.fromkeys(alphabet)]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def small_model(
    vocab_size: int, *, hidden: int = 192, layers: int = 2, max_length: int = 512, seed: int = 0
) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 in float32; the defaults make about 1M parameters.

    The same seed gives the same weights and leaves torch's global generator as it was. Qwen3 and not Qwen2: a
    tokenizer saved beside a Qwen2 is loaded as `Qwen2Tokenizer`, which drops spaces and newlines.
    """
    heads = max(2, hidden // 32)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        # The usual 0.02 is meant for wide models: at this width sums took about 1,000 steps with it, 600 with this.
        initializer_range=0.08,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=None,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
