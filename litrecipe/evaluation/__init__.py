"""Measuring a model: log-likelihoods, lm-eval tasks, built-in tasks, and the tables they end in."""
