"""Recipes and clusters, as the user writes them, and their schema. Imports pydantic and yaml, never jax."""
