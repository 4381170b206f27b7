"""Models that judge: examples, training, scoring, rounds inside a run, labels of steps."""
