"""Progress lines, one-sentence failures and pip, for the set-up. Standard library only."""
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class SetupError(Exception):
    """Something that cannot be had; the message is one sentence for the user."""


@contextmanager
def step(name: str):
    """Print `name`, run the block, print how long it took. A SetupError passes through."""
    print(f"{name} ...", end=" ", flush=True)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"done ({time.monotonic() - started:.1f} s)", flush=True)


NO_NETWORK = re.compile(
    r"NewConnectionError|Failed to establish a new connection|name resolution|getaddrinfo failed|Network is unreachable|ConnectTimeoutError|"
    r"ReadTimeoutError|Read timed out|ProxyError|Connection (aborted|refused|reset)|nodename nor servname|Max retries exceeded|Name or service not known", re.I)
NO_DISK = re.compile(r"No space left on device|Errno 28|not enough space on the disk|Disk quota exceeded|Errno 122", re.I)
NOT_FOUND = re.compile(r"No matching distribution found for ([^\s;]+)", re.I)
REFUSED = re.compile(r"Permission denied|Access is denied|externally-managed-environment", re.I)


def explain_pip(output: str, what: str, log: Path) -> str:
    """One sentence for the output of a pip that failed while installing `what`."""
    if NO_DISK.search(output):
        return f"The disk is full, so {what} could not be installed: free about 8 GB and run the command again."
    # without a network pip also says "no matching distribution", so the network is asked about first
    if NO_NETWORK.search(output):
        return f"The Python package index could not be reached, so {what} could not be installed: check the network or proxy and run the command again."
    missing = NOT_FOUND.search(output)
    if missing:
        # "from versions: none" is also all that pip says about a failed connection when its retries are switched off
        cause = "check the network, or use another Python (3.10 or newer)" if "from versions: none" in output else "use another Python (3.10 or newer)"
        return f"pip found no {missing.group(1)} for Python {sys.version_info.major}.{sys.version_info.minor} on this system, so {what} could not be installed: {cause}."
    if REFUSED.search(output):
        return f"{what[0].upper() + what[1:]} could not be installed because pip may not write there: check the permissions of the folder (details in {log})."
    return f"pip could not install {what}: read the last lines of {log}."


def pip(python: Path | str, arguments: list[str], what: str, log: Path) -> None:
    """Run the pip of `python`; output goes to the file `log`, and on a terminal its current line is shown. Raises SetupError."""
    command = [str(python), "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    shown = sys.stdout.isatty()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ pip {' '.join(arguments)}\n")
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
        for line in child.stdout:
            lines.append(line)
            file.write(line)
            if shown and line.startswith(("Collecting", "Downloading", "Installing")):
                width = max(20, shutil.get_terminal_size().columns - 4)
                print(f"\n  {line.strip()[:width]}\033[K\033[A", end="", flush=True)
        status = child.wait()
    if shown:
        print("\n\033[K", end="", flush=True)
    if status:
        raise SetupError(explain_pip("".join(lines), what, log))


def need_disk(folder: Path, gigabytes: float, what: str) -> None:
    """Raise SetupError unless `folder`'s disk has that much room."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise SetupError(f"{what} needs about {gigabytes:g} GB of free disk space, found {free:.1f} GB: free some space and run the command again.")
