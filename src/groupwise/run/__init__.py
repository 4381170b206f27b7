"""The loop: sample, score, learn, evaluate, save."""
