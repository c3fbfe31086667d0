"""The typed recipe: dataclasses, merging, validation. Imports no torch."""
