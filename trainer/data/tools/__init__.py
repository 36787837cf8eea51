"""What `launch data` does: convert, index, verify and summarize datasets. No jax in here."""
