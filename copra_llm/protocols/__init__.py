"""Experiments made of the parts: many runs, resumable, one result record each."""
