"""One file a thing you can run; each reads top to bottom."""
