"""From scored groups to new weights: packing, forward passes, the optimizer, the reference."""
