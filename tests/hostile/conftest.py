"""The service, and children as confined as its conversions."""

from tests.support.confined import cell, landlock  # noqa: F401
from tests.support.served import *  # noqa: F403
