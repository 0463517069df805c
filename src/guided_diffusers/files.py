"""Files and folders: atomic writes, locks, checks before the work, JSON."""

from __future__ import annotations

import errno
import glob
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from filelock import BaseFileLock


logger = logging.getLogger(__name__)


LOCK = ".lock"  # of a folder; `.lock.json` beside it names the process that has it


#: errors of file systems that have no locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def aside(path: Path, exclusive: bool = False) -> Iterator[Path]:
    """Context manager for an atomic write: yields a temporary path, moved to `path` on exit.

    After an error the temporary file is removed, and `path` is as before.

    Raises:
        OSError: naming `path`, if it can't be written, such as on a full disk.
        FileExistsError: with `exclusive`, if `path` exists on exit.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if exclusive:
            _link(partial, path)
        else:
            os.replace(partial, path)
    except OSError as error:
        text = f"{path} can't be written: {error.strerror or error}"
        raise (OSError(text) if error.errno is None else OSError(error.errno, text)) from error
    except SafetensorError as error:  # which is no OSError
        raise OSError(f"{path} can't be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Give a file the name `path`; FileExistsError if there is a file of this name."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.open("x").close()
        os.replace(partial, path)


def partial_path(path: Path) -> Path:
    """Temporary path beside `path`, of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def is_abandoned(partial: Path) -> bool:
    """Whether a path is a `partial_path` of this process or of one that has ended."""
    pid = partial.name.removesuffix(".partial").rpartition(".")[2]
    is_partial = partial.name.startswith(".") and partial.name.endswith(".partial")
    if not (is_partial and pid.isdecimal()):
        return False
    return int(pid) == os.getpid() or not is_running(int(pid))


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number; on Windows always, as far as known."""
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def check_writable(path: Path, option: str, *, folder: bool = False, size: int = 0) -> None:
    """Check, before the work, that a file can be written, or files in a folder.

    Folders that are missing are created for the check, and removed again.

    Args:
        option: the option or argument that `path` is of.
        size: bytes that will be written at least.

    Raises:
        OSError: naming `option` and `path`, if it can't be written.
    """
    parent, missing = path if folder else path.parent, []
    try:
        missing = missing_folders(parent)
        if path.exists() and path.is_dir() != folder:
            raise OSError(0, "it is a file, not a folder" if folder else "it is a folder")
        parent.mkdir(parents=True, exist_ok=True)
        probe = partial_path(path / "probe" if folder else path)
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(parent).free
        if size > free:
            sizes = f"{size / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free"
            raise OSError(errno.ENOSPC, sizes)
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, FileExistsError):
            reason = f"{parent} is a file"
        raise OSError(f"{option} {path} can't be written: {reason}") from error
    finally:
        remove_empty(missing)


def missing_folders(folder: Path) -> list[Path]:
    """The folder and its parents that don't exist, deepest first."""
    return [part for part in (folder, *folder.parents) if not part.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def file_lock(path: Path, wait: bool = False) -> Iterator[str | None]:
    """Context manager that one process at a time enters; a process that ends loses its lock.

    Where the file system has no locks, which is logged, only processes of one machine keep each
    other out.

    Args:
        path: of the lock. It, its folder, and `PATH.json`, which names the process, are created;
            the files are removed on exit, and so is a folder that is still empty.
        wait: wait for another process, which is logged.

    Yields:
        None; without `wait`, the name of the process that has the lock, if another one has it.

    Raises:
        OSError: naming the folder, if it can't be written.
    """
    from filelock import FileLock

    lock, missing = FileLock(path), missing_folders(path.parent)
    owner = _acquire(lock, path, wait)
    if owner is not None:
        yield owner
        return
    this = {"pid": os.getpid(), "host": socket.gethostname()}
    try:
        with suppress(OSError):  # a full disk
            _record(path).write_text(json.dumps(this))
        yield None
    finally:
        if os.getpid() == this["pid"]:  # no child of it
            # removed while it is locked, so that no other process uses them
            for file in (_record(path), path):
                with suppress(OSError):
                    file.unlink(missing_ok=True)
            lock.release()
            remove_empty(missing)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _acquire(lock: BaseFileLock, path: Path, wait: bool) -> str | None:
    """Acquire a lock; without `wait`, the name of the process that has it, if another one has."""
    waiting = False
    try:
        while not _try_lock(lock, path):
            pid, host = _lock_owner(path)
            place = "" if host == socket.gethostname() else f" on {host}"
            owner = "another process" if pid is None else f"process {pid}{place}"
            if not wait:
                return owner
            if not waiting:
                logger.warning(f"{path.parent} is in use by {owner}; waiting until it is finished")
            waiting = True
            time.sleep(1.0)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"{path.parent} can't be written: {reason}") from error
    return None


def _try_lock(lock: BaseFileLock, path: Path) -> bool:
    """Whether this process got the lock."""
    from filelock import Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):  # the process before has just removed the folder
        return False
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        logger.warning(
            f"{path.parent} is on a file system without locks ({error}); make sure that no process "
            "of another machine uses it"
        )
        pid, host = _lock_owner(path)
        return pid is None or host != socket.gethostname() or not is_running(pid)
    if path.exists():
        return True
    lock.release()  # its file was removed by the process that had it before
    return False


def _lock_owner(path: Path) -> tuple[int | None, str]:
    """Process and machine that have a lock; (None, "") if unknown."""
    try:
        owner = json.loads(_record(path).read_text())
        return int(owner["pid"]), str(owner["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Context manager in which no other process uses the folder; see `file_lock`.

    Raises:
        ValueError: without `wait`, naming the process that uses it.
        OSError: if the folder can't be written.
    """
    with file_lock(folder / LOCK, wait) as owner:
        if owner is not None:
            raise ValueError(
                f"{folder} is in use by {owner}; wait until it is finished, or use another folder"
            )
        yield


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Context manager that writes a folder which appears when it is complete.

    Yields:
        A path beside it to save to; what killed processes left there is removed.

    Raises:
        ValueError: if `output` exists and isn't an empty folder, or if another process writes it.
        OSError: if it can't be written.
    """
    _check_new(output)
    check_writable(output, "output", folder=True)
    folder = output.absolute()  # "." has no name
    with file_lock(folder.with_name(f".{folder.name}.lock")) as owner:
        if owner is not None:
            raise ValueError(f"output {output} is being written by {owner}; give another folder")
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*partial"):
            if is_abandoned(left) or left.name == f".{folder.name}.partial":  # of version 0.3
                shutil.rmtree(left, ignore_errors=True)
        partial = partial_path(folder)
        try:
            yield partial
            _check_new(output)
            if output.exists():  # it may be where somebody works, and stays
                for path in list(partial.iterdir()):
                    os.replace(path, output / path.name)
            else:
                os.replace(partial, output)
        except OSError as error:
            text = (error.strerror or str(error)).replace(str(partial), str(output))
            raise OSError(f"output {output} can't be written: {text}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_new(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output {output} exists; a new or an empty folder is allowed")


def is_lock(path: Path) -> bool:
    """Whether a path is of a folder's lock."""
    return path.name in (LOCK, f"{LOCK}.json")


def write_bytes(content: bytes, path: Path, exclusive: bool = False) -> None:
    """Write a file atomically (see `aside`)."""
    with aside(path, exclusive) as partial:
        partial.write_bytes(content)


def write_json(content: Any, path: Path, exclusive: bool = False) -> None:
    """Write a JSON file atomically (see `aside`); NaN and infinity become null."""
    text = json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
    write_bytes(text.encode(), path, exclusive)


def finite(content: Any) -> Any:
    """Nested mappings and sequences with None in place of NaN and infinity, for JSON."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
