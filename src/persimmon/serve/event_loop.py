"""Which event loop servers, and the clients that measure them, run on."""

from __future__ import annotations

import asyncio


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Uvloop's where it is installed (there is none for Windows): the same interface at less cost per call."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
