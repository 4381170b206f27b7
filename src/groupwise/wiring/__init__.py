"""From a job to the objects that run it: the one place that maps names to classes."""
