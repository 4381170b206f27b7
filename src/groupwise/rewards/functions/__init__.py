"""Functions of users as rewards: how they are found, called, timed out, and kept in a process of their own."""
