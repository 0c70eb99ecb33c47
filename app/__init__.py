"""The service: HTTP API, page, command line, settings."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("clearfold")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0"
