"""`python -m open_mythos` is the command `mythos`, for what starts modules: `torchrun -m open_mythos train`."""

import sys

from open_mythos.cli import main

sys.exit(main())
