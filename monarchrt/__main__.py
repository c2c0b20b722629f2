"""`python -m monarchrt` is the `monarchrt` command."""

import sys

from monarchrt.train.cli import main

sys.exit(main())
