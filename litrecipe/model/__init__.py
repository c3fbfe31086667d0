"""The decoder, its heads, adapters and decoding. Knows tensors; knows no files, no Fabric, no recipes."""
