"""What a run leaves on disk: its folder, checkpoints, events, and models as Hugging Face folders."""
