"""Prompts: rows of files, hub data sets and Python objects, encoded, in a resumable order."""
