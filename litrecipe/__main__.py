"""`python -m litrecipe`."""

import sys

from litrecipe.cli import main

sys.exit(main())
