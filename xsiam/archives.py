"""Fetch and unpack model archives so that nothing half-done or hostile is ever used.

A cache entry is a folder that appears under its final name only when it is complete. An archive is
checked as a whole before the first byte is written.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import ssl
import stat
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from xsiam.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

MAX_UNPACKED_BYTES = 8 * 2**30
"""An archive that says it unpacks to more than this is refused (also the limit of a download)."""
MAX_ARCHIVE_FILES = 10_000
"""An archive with more entries than this is refused."""
NETWORK_TIMEOUT = 30.0
"""Seconds without a byte after which a download is given up."""

_CHUNK = 1 << 20


def fetch_archive(url: str, cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Download and unpack the `.zip` at a URL once; return the model folder inside it.

    The cache entry is keyed by the URL. To download again, delete its folder (a log line names it).

    Raises:
        InputError: Not an http(s) URL of a `.zip`.
        CheckpointError: The download failed, or the archive is damaged or unsafe.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.path.lower().endswith(".zip"):
        raise InputError(
            f"Expected an http or https URL of a `.zip` archive, but got {url!r}. For a model on "
            "the Hugging Face hub give its name, 'organisation/model'."
        )
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    entry = _cache_root(cache_dir) / f"{_slug(PurePosixPath(parts.path).stem)}-{key}"
    if entry.exists():
        logger.info("Using %s from %s; delete that folder to download it again.", url, entry)
        return model_root(entry, url)
    archive = entry.with_name(entry.name + ".zip")
    if not archive.exists():
        _download(url, archive, progress)
    try:
        _unpack(archive, entry, source=url)
    finally:
        # Unpacked it is no longer needed; broken, it must not be met again on the next call.
        archive.unlink(missing_ok=True)
    return model_root(entry, url)


def unpack_archive(archive: Path, cache_dir: Path | None = None) -> Path:
    """Unpack a local `.zip` into the cache once; return the model folder inside it.

    The cache entry is keyed by content: a rebuilt archive of the same name never gives the old one.

    Raises:
        CheckpointError: The archive is damaged or unsafe.
    """
    entry = _cache_root(cache_dir) / f"{_slug(archive.stem)}-{sha256_of(archive)[:16]}"
    if not entry.exists():
        _unpack(archive, entry, source=str(archive))
    return model_root(entry, str(archive))


def model_root(folder: Path, source: str) -> Path:
    """Find the one folder of an unpacked archive that holds a model, nearest to the top.

    Raises:
        CheckpointError: There is none, or more than one.
    """
    for marker in ("modules.json", "config.json"):
        found = [path for path in folder.rglob(marker) if "__MACOSX" not in path.parts]
        depth = min((len(path.parts) for path in found), default=0)
        roots = sorted(path.parent for path in found if len(path.parts) == depth)
        if len(roots) > 1:
            names = [root.relative_to(folder).as_posix() for root in roots]
            raise CheckpointError(
                f"Expected one model in {source}, but found {len(roots)}: {', '.join(names)}. "
                "Unpack it and give the folder of one."
            )
        if roots:
            return roots[0]
    raise CheckpointError(
        f"Expected a folder with `modules.json` or `config.json` in {source}, but found none. Give "
        "an archive of a saved model."
    )


def sha256_of(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, target: Path, progress: bool) -> None:
    """Download to `target`, which only ever exists complete; say plainly why it failed."""
    handle, partial = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        _stream(url, handle, f"Downloading {target.name}", progress)
        os.replace(partial, target)
    except urllib.error.HTTPError as error:
        error.close()
        raise CheckpointError(
            f"Expected an archive at {url}, but the server answered with status {error.code} "
            f"({error.reason}). Check the URL, or give the path of a copy."
        ) from error
    except (
        urllib.error.URLError,
        TimeoutError,
        ConnectionError,
        ssl.SSLError,
        http.client.HTTPException,
    ) as error:
        raise CheckpointError(
            f"Expected to download {url}, but that failed: {error}. Check the network, or give the "
            "path of a copy."
        ) from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _stream(url: str, handle: int, label: str, progress: bool) -> None:
    """Copy a URL's content to an open file descriptor, which is closed; check its length."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    request = urllib.request.Request(url, headers={"User-Agent": "xsiam"})
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    with (
        os.fdopen(handle, "wb") as file,
        urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT) as response,
        Progress(*columns, console=Console(stderr=True), disable=not progress) as bar,
    ):
        length = response.headers.get("Content-Length")
        expected = int(length) if length and length.isdigit() else None
        task = bar.add_task(label, total=expected)
        received = 0
        while chunk := response.read(_CHUNK):
            received += file.write(chunk)
            bar.update(task, completed=received)
            if received > MAX_UNPACKED_BYTES:
                raise CheckpointError(
                    f"Expected an archive of at most {MAX_UNPACKED_BYTES} bytes at {url}, but it "
                    "is larger. Download and unpack it by hand and give the folder."
                )
    # `read(size)` ends quietly when the connection does.
    if expected is not None and received != expected:
        raise CheckpointError(
            f"Expected {expected} bytes from {url}, but the connection ended after {received}. "
            "Try again."
        )


def _unpack(archive: Path, entry: Path, *, source: str) -> None:
    """Check and unpack an archive to `entry`, which only ever exists complete."""
    partial = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            _check_members(members, source)
            for member in members:
                _extract(content, member, partial)
        model_root(partial, source)
        try:
            os.rename(partial, entry)
        except OSError:
            if not entry.is_dir():  # else another process was faster, with the same content
                raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
    ) as error:
        raise CheckpointError(
            f"Expected a readable zip archive, but {source} is damaged: {error}. Get it again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _extract(content: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    """Write one checked entry, without its permissions."""
    target = folder / member.filename
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # `open` yields at most the size that was checked, whatever the data would inflate to.
    with content.open(member) as data, target.open("xb") as file:
        shutil.copyfileobj(data, file, _CHUNK)


def _check_members(members: list[zipfile.ZipInfo], source: str) -> None:
    """Refuse an archive that could write outside its folder or fill the disk."""
    total = sum(member.file_size for member in members)
    if total > MAX_UNPACKED_BYTES or len(members) > MAX_ARCHIVE_FILES:
        raise CheckpointError(
            f"Expected an archive of at most {MAX_UNPACKED_BYTES} bytes in {MAX_ARCHIVE_FILES} "
            f"files, but {source} unpacks to {total} bytes in {len(members)} files. If you trust "
            "it, unpack it by hand and give the folder."
        )
    for member in members:
        if reason := _refusal(member):
            raise CheckpointError(
                "Expected only plain files inside the archive's own folder, but "
                f"{source} holds {member.orig_filename!r}, which {reason}. Do not use this archive."
            )


def _refusal(member: zipfile.ZipInfo) -> str | None:
    """Say why an entry must not be unpacked; None if it may."""
    # Both names: zipfile cuts one at a NUL, rewrites its separators and may take it from elsewhere.
    for name in (member.orig_filename, member.filename):
        if reason := unsafe_path(name):
            return reason
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"uses compression method {member.compress_type}, neither store nor deflate"
    return None


def unsafe_path(name: str) -> str | None:
    """Say why a relative path could lead outside its folder on any system; None if it cannot."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "leads outside the folder"
    return "has a NUL or a backslash in its name" if "\0" in name or "\\" in name else None


def _cache_root(cache_dir: Path | None) -> Path:
    """Return the folder for unpacked archives, created if need be."""
    root = cache_dir or Path(os.environ.get("XSIAM_CACHE") or "~/.cache/xsiam").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    return root


def _slug(name: str) -> str:
    """Make a readable, harmless file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
