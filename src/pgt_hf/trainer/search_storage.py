"""Where a search keeps its trials: storages of Optuna's that wait for a database, or a disk, that comes back."""

import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from ..limits import WritableFile, check_type

_log = logging.getLogger("pgt_hf.search")
_OPENING_SECONDS = 5.0  # how long a storage is waited for while it is opened
_AWAY_SECONDS = 600.0  # and once a search has begun in it


class Storage:
    """What ``open_storage`` takes: the URL of a database whose driver is installed, or ``journal:FILE``."""

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless it is one; a file is tried for writing."""
        check_type(name, value, str)
        shown = re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", value)  # without a password
        message = f"{name} must be the URL of a database, such as sqlite:///FILE, or journal:FILE, got {shown!r}"
        if value.startswith("journal:"):
            if not value.removeprefix("journal:"):
                raise ValueError(message)
            WritableFile().check(name, value.removeprefix("journal:"))
            return
        try:
            url = make_url(value)
            if url.drivername == "postgresql":
                url = url.set(drivername="postgresql+psycopg")
            url.get_dialect().import_dbapi()
        except (ArgumentError, ImportError) as error:
            raise ValueError(f"{message}: {error}") from error
        if url.get_backend_name() == "sqlite" and url.database:
            file = Path(url.database)
            WritableFile().check(name, file)
            if file.exists() and file.stat().st_size and not file.read_bytes()[:16].startswith(b"SQLite format 3"):
                raise ValueError(f"{message}: the file is no SQLite database")


def open_storage(name: str | None, output_dir: str | os.PathLike[str]) -> Any:
    """The storage of a search: any RDB URL, ``journal:FILE``, or by default an SQLite file in ``output_dir``.

    Once ``be_patient`` was called, it is waited for, up to ten minutes, whenever it is away or full.

    Raises:
        ValueError: It cannot be opened.
    """
    if name is None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        name = f"sqlite:///{Path(output_dir, 'search.db').resolve()}"
    shown = name
    try:
        if name.startswith("journal:"):
            return JournalStorage(_Journal(name.removeprefix("journal:")))
        url = make_url(name)
        shown = str(url)  # without its password
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")  # the driver that pgt_hf[search] installs
        return _open_database(url.render_as_string(hide_password=False))
    except ImportError as error:
        missing = error.__cause__ or error
        raise ImportError(f"--storage {shown}: {missing}; pgt_hf[search] has PostgreSQL's driver alone") from error
    except (OSError, SQLAlchemyError, ValueError) as error:
        raise ValueError(f"--storage {shown} cannot be opened: {_reason(error)}") from error


def be_patient(storage: Any) -> None:
    """What could be used once may come back when it fails later."""
    getattr(storage, "_backend", storage).patience = _AWAY_SECONDS


def _open_database(url: str) -> Any:
    for attempt in range(5):
        try:
            return _Database(url)
        except DBAPIError:  # another worker may be making the very same tables
            if attempt == 4:
                raise
            time.sleep(1)


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    """Tries a storage's method again while the storage is away."""

    @functools.wraps(method)
    def again(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun, wait = time.monotonic(), 0.25
        while True:
            try:
                return method(self, *args, **kwargs)
            except ConnectionError:
                raise  # the method has called another one, which has waited already
            except (DBAPIError, OSError, StorageInternalError) as error:
                cause = error.__cause__ if isinstance(error, StorageInternalError) else error
                if not isinstance(cause, InterfaceError | OperationalError | OSError):
                    raise
                away = time.monotonic() - begun
                if away > self.patience:
                    raise ConnectionError(f"the storage of the search cannot be used: {_reason(cause)}") from error
                if time.monotonic() - self.told > 60:
                    self.told = time.monotonic()
                    left = (self.patience - away) / 60
                    _log.warning(
                        "the storage of the search cannot be used; trying again for %.0f min: %s", left, _reason(cause)
                    )
            time.sleep(wait)
            wait = min(2 * wait, 15)

    return again


def _reason(error: BaseException) -> str:
    """What a driver has to say, without the statement that it was about."""
    return str(error.orig if isinstance(error, DBAPIError) else error).strip().split("\n")[0]


class _Database(RDBStorage):
    """A database that may be away for a while."""

    patience, told = _OPENING_SECONDS, float("-inf")

    def __init__(self, url: str) -> None:
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})
        if self.engine.name == "sqlite":  # it knows no SELECT FOR UPDATE, without which two workers take one trial
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


for _name in (*BaseStorage.__abstractmethods__, "_create_new_trial", "_get_trials", "_set_trial_param"):
    setattr(_Database, _name, _patient(getattr(RDBStorage, _name)))


class _Journal(JournalFileBackend):
    """A journal that a full disk does not ruin: the next writer cuts off a line that was not written to its end."""

    patience, told = _OPENING_SECONDS, float("-inf")

    def __init__(self, path: str) -> None:
        self.path, self.lock = path, JournalFileSymlinkLock(path)
        super().__init__(path, self.lock)

    @_patient
    def read_logs(self, log_number_from: int) -> Any:
        try:
            return list(super().read_logs(log_number_from))
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged, or not a journal: {error}") from error

    @_patient
    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        left = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self.lock.acquire()
        try:
            with open(self.path, "r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                if file.read(1) not in (b"\n", b""):
                    file.seek(0)
                    end = file.read().rfind(b"\n") + 1
                file.truncate(end)
                file.seek(end)
                try:
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError as error:
                    if left:  # a whole line may have been read by others
                        file.truncate(end)
                    raise OSError(error.errno, error.strerror, self.path) from error
        finally:
            self.lock.release()
