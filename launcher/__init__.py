"""Plans runs, starts them, watches and restarts them. Of its modules, host/worker.py alone imports jax."""
