"""`python -m swa.cli`."""

import sys

from swa.cli.entry import main

sys.exit(main())
