"""Runs where the user types: decides, starts, watches. Never imports jax, but for worker.py."""
