"""Recipes as jobs of a Slurm cluster: scripts, the queue, sweeps, chains, and a table of runs."""
