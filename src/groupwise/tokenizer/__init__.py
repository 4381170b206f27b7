"""The tokenizer, owned once: prompts to token ids, outputs to text, stop strings, chat templates, the hub. No torch."""
