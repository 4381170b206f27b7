"""The doctor: does what the library promises hold for a user's own model, data and rewards?"""
