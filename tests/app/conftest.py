"""The fixtures that the tests of the service, the client and the command line share."""

from tests.support.served import *  # noqa: F403
