"""The decoder, its heads, adapters and decoding. Knows tensors; knows no files, no Fabric, no recipes."""

import logging

# On import it warns of kernels that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
