"""What the user writes, and its schema. Imports pydantic and yaml, never jax."""
