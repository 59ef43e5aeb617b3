"""Files are written whole or not at all."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError


def make_folder(folder: Path) -> Path:
    """The folder, made if need be, best before the work whose results go there; CheckpointError for a file's path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder} is a file, or in one; give a folder, which is made if need be.") from error
    return folder


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write every file beside its place, then move them in, in order; a failed write leaves the folder as it was."""
    written = {name: folder / f".{name}.{uuid.uuid4().hex}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            written[name].touch()
            mode = written[name].stat().st_mode
            write(written[name])
            written[name].chmod(mode)  # safetensors would keep the file from everybody else
            with open(written[name], "rb+") as opened:
                os.fsync(opened.fileno())  # else a crash could leave the new name on an empty file
        for name, file in written.items():
            os.replace(file, folder / name)
    finally:
        for file in written.values():
            file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write one file of text."""
    write_files(path.parent, {path.name: lambda file: file.write_text(text)})


def write_json(path: Path, value: Any) -> None:
    """Write one file of JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")
