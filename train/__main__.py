"""`python -m train` in a checkout is `python -m monarchrt`."""

import sys

from monarchrt.train.cli import main

sys.exit(main())
