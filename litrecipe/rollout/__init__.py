"""Prompts in, scored completions out."""
