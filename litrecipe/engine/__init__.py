"""Fabric, the one fit loop, and what surrounds it: optimizers, schedules, the run directory, the flight recorder."""
