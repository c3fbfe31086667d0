"""The maths: log-probs in, losses out. Pure functions; no files, no Fabric, no recipes."""
