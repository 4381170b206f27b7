"""From tokens to log-probs: a Hugging Face causal model as a policy, in a layout that has each prompt once."""
