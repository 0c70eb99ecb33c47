"""One lock for all tracing: torch keeps the state of an export per process, so two at once corrupt each other."""

from __future__ import annotations

import threading

TRACING = threading.RLock()
