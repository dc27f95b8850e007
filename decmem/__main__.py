"""``python -m decmem`` is ``decmem``."""

import sys

from decmem.cli import main

sys.exit(main())
