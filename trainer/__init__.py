"""Training, given an initialised jax runtime and a config. Nothing in here knows of clusters."""
