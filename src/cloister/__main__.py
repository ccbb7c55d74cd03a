"""`python -m cloister` is `cloister`."""

import sys

from cloister.cli.entry import main

sys.exit(main())
