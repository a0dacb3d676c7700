"""`python -m open_mythos` is the command mythos: the form that torchrun takes."""

import sys

from open_mythos.cli import main

sys.exit(main())
