"""``python -m dr2net_d2.data``."""

import sys

from dr2net_d2.data.commands import main

sys.exit(main())
