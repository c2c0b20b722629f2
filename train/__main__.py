"""`python -m train` is the `monarchrt` command."""

import sys

from train.cli import main

sys.exit(main())
