"""Links to folders on every system."""
import os
import subprocess
from pathlib import Path


def is_link(path: Path) -> bool:
    """Whether `path` is a symbolic link or, on Windows, a junction."""
    if path.is_symlink():
        return True
    # os.path.isjunction came with Python 3.12; a junction's real path differs from where it lies
    return os.name == "nt" and path.exists() and os.path.normcase(os.path.realpath(path)) != os.path.normcase(os.path.abspath(path))


def link_folder(target: Path, link: Path) -> None:
    """Make `link` lead to the folder `target`; a junction where Windows refuses symbolic links. An equal link is left, an old one replaced.

    Raises FileExistsError if something else is there: it is not ours to remove.
    """
    if is_link(link):
        if link.exists() and os.path.samefile(link, target):
            return
        unlink_folder(link)
    elif link.exists():
        raise FileExistsError(f"{link} is there and is no link: move it away.")
    try:
        os.symlink(target, link, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, capture_output=True)


def unlink_folder(link: Path) -> None:
    """Remove a link that link_folder made, never what it leads to. Nothing there is fine."""
    if link.is_symlink():
        link.unlink()
    elif is_link(link):
        os.rmdir(link)  # a junction: rmdir takes the junction only
