"""What the pack's Save and Load nodes share: one kind of file in the host's input and output folders."""

from __future__ import annotations

import os
from dataclasses import dataclass

from . import files

NONE = "none found"


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    what: its name in messages ("trajectory"). folder: below the output folder, where its saver writes unless told otherwise. suffix: of the files that
    the saver writes. extensions: of all that the loader reads, `suffix` ending in one of them. saver: display name of the node. offered: endings of the
    files of the input folder that are listed, where that is not all that is read.
    """

    what: str
    folder: str
    suffix: str
    extensions: tuple[str, ...]
    saver: str
    offered: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """Default of the saver's filename_prefix."""
        return f"{self.folder}/palimpsest"

    def names(self) -> list[str]:
        """Values for the loader's widget: files of the input folder, and of the output folder's own place for this kind, marked [output].

        Names that are not in the list can be given all the same.
        """
        import folder_paths

        saved = files.listed(os.path.join(folder_paths.get_output_directory(), self.folder), (self.suffix,))
        return files.listed(folder_paths.get_input_directory(), self.offered or self.extensions) + [f"{self.folder}/{name} [output]" for name in saved]

    def options(self) -> list[str]:
        """`names`, or the one entry that says there are none: an empty list breaks the widget."""
        return self.names() or [NONE]

    def resolve(self, name: str) -> str:
        """Full path of a widget value. Raises ValueError, one sentence, for a name that leaves the host's folders or is of no kind that is read."""
        path = files.resolve(name, self.what)
        if not path.lower().endswith(self.extensions):
            raise ValueError(f"The {self.what} file {name} does not end in {' or '.join(self.extensions)}: choose one written by {self.saver}.")
        return path

    def new_file(self, prefix: str) -> tuple[str, str]:
        """(path of the next file under a filename_prefix, its name as `names` lists it)."""
        import folder_paths

        folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
        name = f"{filename}_{counter:05}_{self.suffix}"
        return os.path.join(folder, name), f"{subfolder}/{name} [output]".lstrip("/").replace(os.sep, "/")

    def check(self, name: str | None) -> bool | str:
        """For a loader's validate_inputs: True, or the sentence that says what is wrong.

        A loader that takes over this check lets API users name a file that was saved after the list was made.
        """
        if name is None:  # linked from another node, known only when it runs
            return True
        if name == NONE:
            return f"There is no {self.what} file yet: save one with {self.saver}, or copy one into the input folder."
        try:
            path = self.resolve(name)
        except ValueError as error:
            return str(error)
        return True if os.path.isfile(path) else f"The {self.what} file {name} does not exist: choose another, or save one with {self.saver}."

    def stamp(self, name: str | None) -> str:
        """For a loader's fingerprint_inputs: changes when the file does."""
        try:
            status = os.stat(self.resolve(name))
        except (OSError, ValueError, TypeError, AttributeError):
            return str(name)
        return f"{status.st_mtime_ns}:{status.st_size}"


def saved_line(listed: str, path: str) -> str:
    """What a saver shows: the file's name and size."""
    size = os.path.getsize(path)
    return f"Saved {listed.removesuffix(' [output]')} ({size / 1e6:.2f} MB)"
