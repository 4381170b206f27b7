"""The engine that samples from the policy's own weights, in its own process."""
