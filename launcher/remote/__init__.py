"""Hosts that are reached by ssh: waiting for them, preparing them, following the agents on them."""
