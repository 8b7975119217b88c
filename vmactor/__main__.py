"""``python -m vmactor``: the same as the ``vmactor`` command."""

import sys

from vmactor.cli import main

sys.exit(main())
