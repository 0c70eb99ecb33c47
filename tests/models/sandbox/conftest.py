"""The fixtures of the sandbox's tests."""

from tests.support.confined import *  # noqa: F403
