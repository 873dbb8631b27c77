"""Seconds: recipes timed against dense, latency profiles, full-size models of random weights."""
