"""The embedded job: its questions, its model, how that is warmed up, and its reward."""
