"""Training, given an initialised jax runtime and a config. Knows no cluster."""
