"""Tiny tokenizers of each kind that the codec has to cope with, made in code."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["step one: 47+38=85\n\n", "the answer is 85.\n", "a naïve café costs 5 €, 😀 said 東京\n"] * 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<end>\n{% endfor %}"
    "{% if tools %}tools:{{ tools | length }}\n{% endif %}{% if mood %}mood:{{ mood }}\n{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def wrapped(core: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    """A `tokenizers` object as transformers hands it around."""
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """GPT-2's kind: every byte has a token, so a character may span several tokens. `<end>` is 0, `<bos>` is 1."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<end>", "<bos>"],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return wrapped(core, eos_token="<end>", bos_token="<bos>", chat_template=chat_template)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama-2's kind: words begin with a space mark, decoding drops the first one, unknown characters fall to bytes."""
    letters = sorted({character for text in CORPUS for character in text if character.isascii() and character.strip()})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁a", "▁the"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a")]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def character_level(alphabet: Iterable[str], unknown: bool = False) -> PreTrainedTokenizerFast:
    """One token per character after `<end>` (0) and, where asked for, `<unk>`."""
    tokens = ["<end>", *(["<unk>"] if unknown else []), *alphabet]
    vocab = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>") if unknown else models.WordLevel(vocab))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return wrapped(core, eos_token="<end>", **({"unk_token": "<unk>"} if unknown else {}))


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's kind: lower-cased words, joined by a decoder that looks at its neighbours. No end token."""
    tokens = ["[UNK]", "[SEP]", "hello", "world", "##ly", "don", "'", "t", ",", "."]
    core = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return wrapped(core, unk_token="[UNK]", sep_token="[SEP]")


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path, model_type: str = "qwen3", **config: Any) -> Path:
    """A model folder with the tokenizer and a config of `model_type`, but no weights."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": len(tokenizer), **config}))
    return folder
