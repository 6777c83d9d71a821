"""`python -m mpiattn`: the same as the command `mpiattn`."""

import sys

from .commands.cli import main

sys.exit(main())
