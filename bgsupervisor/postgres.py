"""PostgreSQL: how it is connected to, what holds off other writers, and what its errors mean. Knows no table.

SQLite lets one writer in at a time, and the ledger's longer transactions rely on that. Here they take a lock of the
whole installation first (`hold_off`); what needs none runs beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import select
from typing import Any

import peewee

from bgsupervisor.config import masked
from bgsupervisor.errors import AccessError, ConfigError, DatabaseError

__all__ = [
    "Listener",
    "Server",
    "explain",
    "hold_off",
    "is_lost",
    "is_of_one_row",
    "is_passing",
    "lock_key",
    "open_server",
]

STATEMENT_TIMEOUT_S = 60
IDLE_TRANSACTION_TIMEOUT_S = 10
"""A process that is stopped in the middle of a transaction holds up all others for so long at most."""
_LINK = {
    "application_name": "bgsupervisor",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}

# Classes of SQLSTATE, and single ones, after which the same write can succeed later: the connection, a deadlock,
# resources, a lock that was not to be had, an operator's stop, the machine; a read-only server, an idle transaction.
_PASSING_CLASSES = frozenset({"08", "40", "53", "55", "57", "58"})
_PASSING = frozenset({"25006", "25P03"})
# What is wrong with a row's values: data, integrity, and limits such as the size of an index's row.
_OF_ONE_ROW_CLASSES = frozenset({"22", "23", "54"})
_REFUSED = ("authentication failed", "no password supplied", "no pg_hba.conf entry", "role ", "permission denied")
# By the SQLSTATE or how it begins; the driver has none for a connection that failed, so there by what the server said.
_SENTENCES = {
    "42P01": "{where} lacks tables or columns of this version ({text}); run `bgsupervisor migrate`",
    "42703": "{where} lacks tables or columns of this version ({text}); run `bgsupervisor migrate`",
    "55P03": "{where} is locked by another writer for longer than {waited_s:g} s; try again",
    "53100": "{where} cannot be written, the disk is full; free some space and try again",
    "25006": "{where} is read-only, as a standby is; name the server that takes writes",
    "53": "{where} has no memory or connection left ({text}); raise its limits, or ask for less",
    "too many": "{where} has no connection left ({text}); raise its limit, or connect less often",
    "connection slots": "{where} has no connection left ({text}); raise its limit, or connect less often",
    "does not exist": "{where} is not there ({text}); create it, or correct the address",
}


class Server(peewee.PostgresqlDatabase):
    """One database of a server, with an own connection in each thread.

    Attributes:
        url: Its address; never show it but masked.
    """

    url = ""
    _timeout_s = 0.0

    @property
    def timeout(self) -> float:
        """How many seconds a call waits for a lock that another has; changed for this thread's connection too."""
        return self._timeout_s

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout_s = seconds
        if not self.is_closed():
            execute: Any = self.execute_sql
            execute(self._set_timeout())

    def _initialize_connection(self, conn: Any) -> None:  # noqa: ANN401 - psycopg may not be installed
        conn.execute(self._set_timeout())

    def _set_timeout(self) -> str:
        return f"SET lock_timeout = {max(1, math.ceil(self._timeout_s * 1000))}"  # 0 would mean for ever


def open_server(url: str, *, busy_timeout_s: float, durable: bool) -> Server:
    """Make a database object for *url*; connects to nothing yet. What the address itself sets wins over our settings.

    Raises:
        ConfigError: The driver is not installed, or cannot read the address.
    """
    try:
        import psycopg.conninfo  # noqa: PLC0415 - 0.2 s that only users of PostgreSQL pay
    except ImportError:
        raise ConfigError(
            "the database is one of PostgreSQL, but its driver psycopg is not installed; "
            "install it with `pip install 'bgsupervisor[postgres]'`"
        ) from None
    try:
        known: dict[str, Any] = dict(psycopg.conninfo.conninfo_to_dict(url))
    except psycopg.Error:
        raise ConfigError(f"the address {masked(url)} of the database cannot be read by psycopg") from None
    settings = {
        "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
        "idle_in_transaction_session_timeout": f"{IDLE_TRANSACTION_TIMEOUT_S}s",
        "plan_cache_mode": "force_custom_plan",  # one made while a table was small reads all of it when it is large
        "default_transaction_isolation": "read\\ committed",  # what is read after `hold_off` is as of then
        "synchronous_commit": "on" if durable else "off",  # an acknowledged request survives a power cut
        "TimeZone": "UTC",
    }
    ours = " ".join(f"-c {name}={value}" for name, value in settings.items())
    known["options"] = f"{ours} {known.get('options') or ''}".strip()
    server = Server(known.pop("dbname"), prefer_psycopg3=True, autoconnect=False, **{**_LINK, **known})
    server.url, server.timeout = url, busy_timeout_s
    return server


class Listener:
    """Becomes readable when somebody has committed a request, a cancel or a retry; a connection of its own.

    Raises:
        OSError: The server is away.
    """

    def __init__(self, server: Server, prefix: str) -> None:
        import psycopg  # noqa: PLC0415 - 0.2 s that only users of PostgreSQL pay

        self._driver: Any = psycopg
        try:
            self._connection = psycopg.connect(dbname=server.database, autocommit=True, **server.connect_params)
            self._connection.execute(f'LISTEN "{prefix}wake"')
        except psycopg.Error as error:
            raise OSError("the server is away") from error

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._connection.fileno()

    def drain(self) -> bool:
        """Take in all that has come, without blocking; tell whether anything had.

        Raises:
            OSError: The connection is lost; what is sent meanwhile is not heard.
        """
        try:
            return bool(list(self._connection.notifies(timeout=0)))
        except self._driver.Error as error:
            raise OSError("the server is away") from error

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()


def lock_key(prefix: str) -> int:
    """Return the number of the lock of the installation with this prefix; each database has its own locks."""
    return int.from_bytes(hashlib.sha256(f"bgsupervisor {prefix}".encode()).digest()[:8], "big", signed=True)


def hold_off(database: peewee.Database, key: int) -> None:
    """Hold off all others who call this, until the open transaction ends; waits for them at most its timeout."""
    database.execute_sql("SELECT pg_advisory_xact_lock(%s)", (key,))


def is_lost(database: peewee.Database) -> bool:
    """Whether this thread's connection, which has no transaction open, is gone; asks nobody but the kernel.

    Nothing comes to an idle connection but the word that it is over.
    """
    connection = _connection(database)
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def is_passing(error: BaseException) -> bool:
    """Whether the same write may succeed later, judged by the driver's error."""
    state = _state(error)
    if state is None:
        return _is_of_driver(error) and type(error).__name__ in {"OperationalError", "InterfaceError"}
    return state[:2] in _PASSING_CLASSES or state in _PASSING


def is_of_one_row(error: BaseException) -> bool | None:
    """Whether a row's values are wrong, and not the database; None if it is no error of the driver."""
    if not _is_of_driver(error):
        return None
    state = _state(error)
    if state is None:
        return type(error).__name__ in {"DataError", "ProgrammingError", "NotSupportedError"}
    return state[:2] in _OF_ONE_ROW_CLASSES


def explain(error: BaseException, database: peewee.Database) -> DatabaseError | AccessError:
    """Say in one sentence what is wrong, judged by the driver's error, and what to do."""
    state, text = _state(error) or "", _told(error, database)
    where = f"the database {masked(getattr(database, 'url', '') or str(database.database))}"
    if state.startswith("28") or state == "42501" or (not state and any(word in text for word in _REFUSED)):
        user = str(database.connect_params.get("user") or "of this process")
        message = f"{where} refuses the user {user} ({text}); check the address, the password and the user's rights"
        return AccessError(message, path=where.removeprefix("the database "), user=user, right="write")
    waited_s = getattr(database, "timeout", 0.0)
    for sign, sentence in _SENTENCES.items():
        if state.startswith(sign) if sign[0].isdigit() else not state and sign in text:
            return DatabaseError(sentence.format(where=where, text=text, waited_s=waited_s))
    if is_passing(error):
        return DatabaseError(f"{where} is away or has given up ({text}); see whether the server runs, and try again")
    return DatabaseError(f"{where} cannot be used: {text}")


def _connection(database: peewee.Database) -> Any:  # noqa: ANN401 - psycopg may not be installed
    connect: Any = database.connection
    return connect()


def _state(error: BaseException) -> str | None:
    state: str | None = getattr(error, "sqlstate", None)
    return state


def _is_of_driver(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "psycopg"


def _told(error: BaseException, database: peewee.Database) -> str:
    """Return the first line of what the driver says, without the password, whatever it quotes."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    with contextlib.suppress(AttributeError):
        password = database.connect_params.get("password")
        text = text.replace(password, "***") if password else text
    return text
