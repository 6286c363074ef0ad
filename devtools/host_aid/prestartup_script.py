"""Runs inside a server that devtools/server.py starts: log lines get their level and file, and the server ends with its starter."""
import logging
import os
import sys
import threading

# the host's own format has neither, so nobody could tell a warning of this pack from other lines
for handler in logging.getLogger().handlers:
    handler.setFormatter(logging.Formatter("[%(levelname)s] [%(pathname)s] %(message)s"))


def end_with_parent() -> None:
    """The starter holds the other end of stdin; it closes when the starter ends, however it ends."""
    try:
        while os.read(sys.__stdin__.fileno(), 1024):
            pass
    except OSError:
        pass
    os._exit(0)


if os.environ.get("PALIMPSEST_END_WITH_PARENT"):
    threading.Thread(target=end_with_parent, daemon=True).start()
