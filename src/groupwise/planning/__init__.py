"""What a job will take on this machine, and how it is made to fit."""
