"""The tools of `launch data`: convert, index, verify, inspect, order. They never load jax."""
