"""The fixtures that the tests of the service, the client and the command line share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from served import *  # noqa: F403
