"""Where a search keeps its trials: Optuna's storages, made to wait for a database or a disk that is away or full."""

import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from ..limits import WritableFile, check_type, checked

_log = logging.getLogger("pgt_hf.search")
_JOURNAL = "journal:"
_AWAY_SECONDS = 600.0  # how long a storage that could be opened is waited for


class Storage:
    """What ``open_storage`` takes: the URL of a database whose driver is installed, or ``journal:FILE``."""

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError unless it is one; a file is tried for writing."""
        check_type(name, value, str)
        message = (
            f"{name} must be the URL of a database, such as sqlite:///FILE, or journal:FILE, got {_shown(value)!r}"
        )
        file: str | None = value.removeprefix(_JOURNAL)
        if not value.startswith(_JOURNAL):
            try:
                url = _database_url(value)
                url.get_dialect().import_dbapi()
            except (ArgumentError, ImportError) as error:
                raise ValueError(f"{message}: {error}") from error
            file = url.database or "" if url.get_backend_name() == "sqlite" else None
        if file is not None:
            if file.strip() in ("", ":memory:"):
                raise ValueError(f"{message}, which names no file")
            WritableFile().check(name, file)
            if value.startswith(_JOURNAL) and os.path.exists(file) and Path(file).read_bytes()[:1] not in (b"", b"{"):
                raise ValueError(f"{message}, a file that is no journal")


@checked
def open_storage(
    storage: Annotated[str | None, Storage()], output_dir: str | os.PathLike[str]
) -> RDBStorage | JournalStorage:
    """The storage of a search: any RDB URL, ``journal:FILE``, or by default an SQLite file in ``output_dir``.

    Once it is open, it is waited for, up to ten minutes, whenever it is away or full.
    """
    if storage is None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{Path(output_dir, 'search.db').resolve()}"
    try:
        if storage.startswith(_JOURNAL):
            return JournalStorage(_Journal(storage.removeprefix(_JOURNAL)))
        return _open_database(_database_url(storage).render_as_string(hide_password=False))
    except (OSError, SQLAlchemyError, ValueError) as error:
        raise ValueError(f"storage {_shown(storage)} cannot be opened: {_reason(error)}") from error


def _database_url(name: str) -> URL:
    url = make_url(name)
    driver = "postgresql+psycopg" if url.drivername == "postgresql" else url.drivername  # what pgt_hf[search] installs
    return url.set(drivername=driver)


def _shown(name: str) -> str:
    """The name of a storage without a password."""
    return re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", name)


def _open_database(url: str) -> "_Database":
    for _ in range(4):
        with suppress(DBAPIError):  # another worker may be making the very same tables
            return _Database(url)
        time.sleep(1)
    return _Database(url)


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
                # Optuna asks on in a transaction whose connection was cut: that is the pending rollback.
                if not isinstance(cause, InterfaceError | OperationalError | PendingRollbackError | OSError):
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
    """The first line of a driver's message, without the SQL statement."""
    return str(error.orig if isinstance(error, DBAPIError) else error).strip().split("\n")[0]


class _Database(RDBStorage):
    """A database that may be away for a while."""

    patience, told = _AWAY_SECONDS, float("-inf")

    def __init__(self, url: str) -> None:
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})
        if self.engine.name == "sqlite":  # it has no SELECT FOR UPDATE, without which two workers may take one trial
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


for _name in (*BaseStorage.__abstractmethods__, "_create_new_trial", "_get_trials", "_set_trial_param"):
    setattr(_Database, _name, _patient(getattr(RDBStorage, _name)))


class _Journal(JournalFileBackend):
    """A journal that a full disk does not ruin: the next writer cuts off a line that was not written to its end."""

    patience, told = _AWAY_SECONDS, float("-inf")

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
