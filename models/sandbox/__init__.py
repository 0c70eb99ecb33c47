"""The sandbox of the processes that read files from outside: `confine` puts this process into it."""

from models.sandbox.confinement import Confinement, ThreadsRunning, confine
from models.sandbox.limits import Limits
from models.sandbox.places import Profile, for_file, for_zoo

__all__ = ["Confinement", "Limits", "Profile", "ThreadsRunning", "confine", "for_file", "for_zoo"]
