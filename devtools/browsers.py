"""Finding (and in CI installing) a Chromium for the browser tests. Standard library only."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .steps import step

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "%ProgramFiles%/Google/Chrome/Application/chrome.exe",
    "%ProgramFiles(x86)%/Microsoft/Edge/Application/msedge.exe",
)


def find_chromium() -> str | None:
    """The browser that CHROMIUM names, else one on the path or in its usual place, else None."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or next((place for place in map(os.path.expandvars, PLACES) if Path(place).is_file()), None)


def install_chromium() -> None:
    """Install the distribution's Chromium with apt-get where there is none; says so and goes on where that cannot be done."""
    if find_chromium():
        return
    apt = shutil.which("apt-get")
    if sys.platform != "linux" or not apt:
        print("No Chromium was found and there is no apt-get here to install one, so the browser tests have none.")
        return
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    with step("Installing Chromium"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            try:
                done = subprocess.run([*prefix, apt, *arguments], env=env, capture_output=True, text=True)
            except OSError as error:
                print(f"(apt-get could not be run: {error.strerror})", end=" ")
                return
            if done.returncode and arguments[0] == "install":
                print("(apt-get could not install chromium)", end=" ")
