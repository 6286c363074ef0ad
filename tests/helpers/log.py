"""Reading a server's log."""
from pathlib import Path


def our_warnings(server, root: Path) -> list[str]:
    """What the server logged at WARNING or above while it started that names the pack or comes from its files."""
    found = []
    for record in server.startup_records():
        path = record.path.replace("\\", "/")
        ours = "/custom_nodes/palimpsest/" in path or path.startswith(root.as_posix()) and not path.startswith(server.host.as_posix())
        # the host's own messages may name its folders, which can lie below the checkout
        message = record.message.replace(str(server.host), "").replace(str(server.base), "")
        if record.level in ("WARNING", "ERROR", "CRITICAL") and (ours or "palimpsest" in message.replace(str(root), "").lower()):
            found.append(f"{record.level} {path}: {record.message}")
    return found
