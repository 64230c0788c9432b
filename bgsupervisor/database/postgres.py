"""PostgreSQL: how it is connected to, what locks out other writers, and what its errors mean. Knows no table.

SQLite lets one writer in at a time, and the ledger's longer transactions rely on that. Here they take a lock of the
whole installation first (`lock_out_writers`); what needs none runs beside them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import select
import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import peewee

from bgsupervisor.addresses import masked
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import AccessError, ConfigError, DatabaseError, ServerAway

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = [
    "Listener",
    "Server",
    "Transaction",
    "draw",
    "explain",
    "is_locked",
    "is_lost",
    "is_of_one_row",
    "is_passing",
    "lock_key",
    "lock_out_writers",
    "open_server",
    "outcome_of",
    "transaction_of",
]

STATEMENT_TIMEOUT_S = 60
IDLE_TRANSACTION_TIMEOUT_S = 10
"""A process that is stopped in the middle of a transaction holds up all others for so long at most."""
SILENT_S = 1.0
"""A server that says nothing for so long beyond what it may wait for a lock is dialled: does it live at all?"""
PROBE_S = 1.0
"""One that answers does so within this."""
STUCK_S = 600.0
"""A server that lives, and one session of it that says nothing for so long: it is stopped, or lost."""
STUCK_HURRIED_S = 10.0
"""The same for who must not wait."""
DIAL_S = 5.0
DIAL_WAIT_S = 0.2
"""Who must not wait does so for the first moment of a dial, in which nearly all succeed."""
DIAL_PAUSE_S = 0.5
HANG_UP_S = 0.5
"""So long a server may take to end the session of a connection that was closed."""
CHUNK_BYTES = 4096
_LINK = {
    "application_name": "bgsupervisor",
    "connect_timeout": f"{DIAL_S:.0f}",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}

# Classes of SQLSTATE, and single ones, after which the same write can succeed later: the connection, a deadlock,
# resources, a lock that was not to be had, an operator's stop, the machine; a read-only server, an idle transaction.
_PASSING_CLASSES = frozenset({"08", "40", "53", "55", "57", "58"})
_PASSING = frozenset({"25006", "25P03"})
# After these, and after errors of the driver's own, there is no connection any more; another one may work.
_GONE = frozenset({"57P01", "57P02", "57P03", "57P05", "25P03"})
# What is wrong with a row's values: data, integrity, and limits such as the size of an index's row.
_OF_ONE_ROW_CLASSES = frozenset({"22", "23", "54"})
_REFUSED = ("authentication failed", "no password supplied", "no pg_hba.conf entry", "role ", "permission denied")
_POOLED = (
    "{where} is behind a connection pooler (PgBouncer or its like), under which a session's locks, time limits and "
    "LISTEN do not last; name the server itself"
)
# By the SQLSTATE or how it begins; the driver has none for a connection that failed, so there by what the server said.
_SENTENCES = {
    "42P01": "{where} lacks tables or columns of this version ({text}); run `bgsupervisor migrate`",
    "42703": "{where} lacks tables or columns of this version ({text}); run `bgsupervisor migrate`",
    "55P03": "{where} is locked by another writer for longer than {waited}; try again",
    "53100": "{where} cannot be written, the disk is full; free some space and try again",
    "25006": "{where} is read-only, as a standby is; name the server that takes writes",
    "53": "{where} has no memory or connection left ({text}); raise its limits, or ask for less",
    "too many": "{where} has no connection left ({text}); raise its limit, or connect less often",
    "connection slots": "{where} has no connection left ({text}); raise its limit, or connect less often",
    "unsupported startup parameter": _POOLED,
    "does not exist": "{where} is not there ({text}); create it, or correct the address",
}


class Server(peewee.PostgresqlDatabase):
    """One database of a server, with an own connection in each thread.

    Attributes:
        url: Its address; never show it but masked.
    """

    url = ""
    _timeout_s = 0.0
    _clock = SystemClock()
    _dial: Dial | None = None
    _dial_again_at = 0.0
    _dial_by = 0.0
    _told = ""

    hurried = False
    """Whether its one user must not wait: then a server that is away is dialled while the user does other things."""

    @property
    def timeout(self) -> float:
        """How many seconds a call waits for a lock that another has; changed for this thread's connection too."""
        return self._timeout_s

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout_s = seconds
        if not self.is_closed():
            execute: Any = self.execute_sql
            execute(f"SELECT {self._set_timeout()}")

    def connect(self, reuse_if_open: bool = False) -> bool:  # noqa: FBT002 - as Peewee has it
        """Connect in this thread; False if it is already.

        Raises:
            DatabaseError: A pooler is in between, so that this session may be another one in the next transaction.
        """
        if not super().connect(reuse_if_open=reuse_if_open):
            return False
        execute: Any = self.execute_sql
        connect: Any = self.connection
        _read_all_times(connect())
        pid = execute(f"SELECT pg_backend_pid(), {self._set_timeout()}").fetchone()[0]
        if pid != connect().info.backend_pid:
            self.close()
            raise DatabaseError(_POOLED.format(where=f"the database {masked(self.url)}"))
        return True

    def _connect(self) -> Any:  # noqa: ANN401 - psycopg may not be installed
        if self.hurried:
            self._dial_first()
        connection = _watched_connection().connect(dbname=self.database, autocommit=True, **self.connect_params)
        connection.server = self
        return connection

    def hang_up(self) -> None:
        """Close this thread's connection, and see that the server's end is closed: then it counts no more there."""
        connect: Any = self.connection
        connection = connect()
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            copy = None if connection.closed else stack.enter_context(socket.socket(fileno=os.dup(connection.fileno())))
            self.close()
            if copy is not None:
                copy.settimeout(HANG_UP_S)
                while copy.recv(CHUNK_BYTES):
                    pass
        self.close()

    def _dial_first(self) -> None:
        """Return once the server answers; until then raise at once what the driver would have raised."""
        now, wait_s = self._clock.monotonic(), 0.0
        if self._dial is None:
            if now < self._dial_again_at:
                raise _away(self._told)
            self._told = self._told or "no answer yet"
            self._dial, self._dial_by, wait_s = Dial(self), now + DIAL_S, DIAL_WAIT_S
        told = self._dial.answer(wait_s)
        if told is None and now < self._dial_by:
            raise _away(self._told)
        self._dial.close()
        self._dial = None
        self._told = f"no answer within {DIAL_S:g} s" if told is None else told
        if self._told:
            self._dial_again_at = now + DIAL_PAUSE_S
            raise _away(self._told)

    def give_up(self, connection: Any, silent_s: float) -> None:  # noqa: ANN401 - as above
        """See whether a server lives that has been silent for so long; if not, close the connection and raise."""
        if silent_s < (STUCK_HURRIED_S if self.hurried else STUCK_S):
            dial = Dial(self)
            told = dial.answer(PROBE_S)
            dial.close()
            if told == "" or (told is not None and "FATAL" in told):  # it refuses: it lives
                return
        connection.close()
        self._told = f"it has not answered for {silent_s:.0f} s"
        raise _away(self._told)

    def _set_timeout(self) -> str:
        return f"set_config('lock_timeout', '{max(1, math.ceil(self._timeout_s * 1000))}', false)"  # 0 is for ever


class Dial:
    """A connection in the making, for which nobody needs to wait: it tells whether a server answers."""

    def __init__(self, server: Server) -> None:
        import psycopg.conninfo  # noqa: PLC0415 - 0.2 s that only users of PostgreSQL pay

        address = psycopg.conninfo.make_conninfo(dbname=server.database, **server.connect_params)
        self._pq: Any = psycopg.pq
        self._connection = psycopg.pq.PGconn.connect_start(address.encode())
        self._clock = SystemClock()

    def answer(self, wait_s: float) -> str | None:
        """Return "" if the server lets us in, what it or the system says if not, None if nothing within *wait_s*."""
        deadline, status = self._clock.monotonic() + wait_s, self._pq.PollingStatus
        while True:
            found = self._connection.connect_poll()
            if found == status.OK:
                return ""
            if found == status.FAILED or self._connection.status == self._pq.ConnStatus.BAD:
                return str(self._connection.get_error_message()) or "refused"
            poll = select.poll()
            poll.register(self._connection.socket, select.POLLIN if found == status.READING else select.POLLOUT)
            left_s = deadline - self._clock.monotonic()
            if not poll.poll(max(0.0, left_s) * 1000):
                return None

    def close(self) -> None:
        """Hang up."""
        self._connection.finish()


def _away(told: str) -> Exception:
    """Return the driver's own error of a server that does not answer."""
    import psycopg  # noqa: PLC0415 - as above

    return psycopg.OperationalError(told)


@functools.cache
def _watched_connection() -> Any:  # noqa: ANN401 - psycopg may not be installed
    """Return the class of our connections: none waits without limit for a server that does not answer."""
    import psycopg  # noqa: PLC0415 - as above

    class Watched(psycopg.Connection[Any]):
        server: Server | None = None

        def __del__(self, *_: object) -> None:
            """Go without a warning: what libpq holds is closed with it, and no user forgot to close anything."""

        def wait(self, gen: Any, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - of the driver
            return super().wait(self._watch(gen), *arguments, **named)

        def _watch(self, gen: Any) -> Generator[Any, Any, Any]:  # noqa: ANN401 - of the driver
            """Pass on what the driver waits for; nothing comes, now and then, while the server is silent."""
            clock = SystemClock()
            since = ask_at = clock.monotonic()
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted
                    now, server = clock.monotonic(), self.server
                    if ready:
                        since = ask_at = now
                    elif server is not None and now - ask_at > server.timeout + SILENT_S:
                        server.give_up(self, now - since)
                        ask_at = clock.monotonic()
                    wanted = gen.send(ready)
            except StopIteration as over:
                return over.value

    return Watched


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
        "default_transaction_isolation": "read\\ committed",  # what is read after `lock_out_writers` is as of then
        "synchronous_commit": "on" if durable else "off",  # an acknowledged request survives a power cut
        "TimeZone": "UTC",
    }
    ours = " ".join(f"-c {name}={value}" for name, value in settings.items())
    known["options"] = f"{ours} {known.get('options') or ''}".strip()
    server = Server(known.pop("dbname"), prefer_psycopg3=True, autoconnect=False, **{**_LINK, **known})
    server.url, server.timeout = url, busy_timeout_s
    return server


def _read_all_times(connection: Any) -> None:  # noqa: ANN401 - of psycopg
    """Have moments that Python has no word for (infinity, 44 BC) read as its first or last: they stop no listing."""
    from psycopg import DataError  # noqa: PLC0415 - who has a connection has it loaded
    from psycopg.types.datetime import TimestamptzLoader  # noqa: PLC0415 - as above

    class Loader(TimestamptzLoader):
        def load(self, data: Any) -> datetime:  # noqa: ANN401 - a buffer
            try:
                return super().load(data)
            except DataError:
                is_past = bytes(data).startswith(b"-") or bytes(data).endswith(b"BC")
                return datetime(1, 1, 1, tzinfo=UTC) if is_past else datetime(9999, 12, 31, tzinfo=UTC)

    connection.adapters.register_loader("timestamptz", Loader)


class Listener:
    """Becomes readable when somebody has committed a request, a cancel or a retry; a connection of its own.

    Raises:
        OSError: The server is away.
    """

    def __init__(self, server: Server, prefix: str) -> None:
        import psycopg  # noqa: PLC0415 - 0.2 s that only users of PostgreSQL pay

        self._driver: Any = psycopg
        try:
            connect = _watched_connection().connect
            self._connection: Any = connect(dbname=server.database, autocommit=True, **server.connect_params)
            self._connection.server = server
            self._connection.execute(f'LISTEN "{prefix}wake"')
        except psycopg.Error as error:
            raise OSError("the server is away") from error

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return int(self._connection.fileno())

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


def lock_out_writers(database: peewee.Database, key: int) -> None:
    """Lock out all other callers of this until the open transaction ends.

    Waits for them at most the connection's own `lock_timeout`; one that the application has passed may have none.

    Raises:
        DatabaseError: The transaction is one of the application's that does not see what they have committed.
    """
    query = "SELECT current_setting('transaction_isolation'), pg_advisory_xact_lock(%s)"
    level = database.execute_sql(query, (key,)).fetchone()[0]
    if level not in ("read committed", "read uncommitted"):
        raise DatabaseError(
            f"the open transaction is {level.upper()} and sees nothing that was committed since it began; "
            "use READ COMMITTED, or do this after the commit"
        )


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


def is_locked(error: BaseException) -> bool:
    """Whether another connection held what was wanted for longer than we wait, judged by the driver's error."""
    return _state(error) == "55P03"


def draw(database: peewee.Database, table: str, column: str) -> int:
    """Take the next number for a column that numbers its rows; nobody else gets it."""
    query = "SELECT nextval(pg_get_serial_sequence(%s, %s))"
    return int(database.execute_sql(query, (f'"{table}"', column)).fetchone()[0])


class Transaction(NamedTuple):
    """What is to be known of a transaction before its COMMIT, to ask afterwards what became of it.

    Attributes:
        number: By which the server knows it even if its connection is lost.
        recovered_at: When the server last rose from a crash or began: it then discards its statistics. What was not
            yet on its disk is gone, and numbers of such transactions are given out again, to others.
    """

    number: str
    recovered_at: str | None


_RECOVERED_AT = "pg_stat_get_bgwriter_stat_reset_time()::text"
_IN_THE_FUTURE = "22023"


def transaction_of(database: peewee.Database) -> Transaction:
    """Return what the open transaction is known by."""
    query = f"SELECT pg_current_xact_id()::text, {_RECOVERED_AT}"
    return Transaction(*database.execute_sql(query).fetchone())


def outcome_of(database: peewee.Database, transaction: Transaction) -> bool | None:
    """Return whether a transaction of a lost connection was committed; None if that is not decided yet.

    One whose session has not heard yet that its client is gone is ended, for its COMMIT cannot come any more.

    Raises:
        DatabaseError: A transaction of this number was committed, but the server has crashed meanwhile: it may be
            another's.
    """
    # A standby may not have heard of it yet.
    asked = "CASE WHEN NOT pg_is_in_recovery() THEN pg_xact_status(%s::xid8) END"
    query = f"SELECT {asked}, {_RECOVERED_AT}"
    try:
        state, recovered_at = database.execute_sql(query, (transaction.number,)).fetchone()
    except peewee.DataError as error:
        driver = error.__cause__ or error.__context__ or error
        if _state(driver) == _IN_THE_FUTURE:  # lost with a crash, and not given out again yet
            return False
        raise
    if state is None:
        return None
    has_crashed = recovered_at is None or recovered_at != transaction.recovered_at
    if state == "committed" and has_crashed:
        raise DatabaseError(
            f"the database {masked(getattr(database, 'url', ''))} has crashed meanwhile, after which it may have given "
            "the number of this transaction to another"
        )
    if state != "in progress" or has_crashed:  # were it ours and committed, it would say so after a crash as well
        return bool(state == "committed")
    database.execute_sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_xid = %s::xid8::xid"
        " AND state LIKE 'idle in transaction%%' AND pid <> pg_backend_pid()",
        (transaction.number,),
    )
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same write may succeed later, judged by the driver's error."""
    state = _state(error)
    if state is None:
        return _is_of_driver(error) and not _kinds(error).isdisjoint({"OperationalError", "InterfaceError"})
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
    waited = f"{database.timeout:g} s" if isinstance(database, Server) else "its lock_timeout"
    for sign, sentence in _SENTENCES.items():
        if state.startswith(sign) if sign[0].isdigit() else not state and sign in text:
            return DatabaseError(sentence.format(where=where, text=text, waited=waited))
    if _is_gone(error):
        return ServerAway(f"{where} is away or has given up ({text}); see whether the server runs, and try again")
    if is_passing(error):
        return DatabaseError(f"{where} is away or has given up ({text}); see whether the server runs, and try again")
    return DatabaseError(f"{where} cannot be used: {text}")


def _connection(database: peewee.Database) -> Any:  # noqa: ANN401 - psycopg may not be installed
    connect: Any = database.connection
    return connect()


def _is_gone(error: BaseException) -> bool:
    """Whether the connection is no more, or could not be had, by the driver's error."""
    state = _state(error)
    return is_passing(error) and (state is None or state.startswith("08") or state in _GONE)


def _state(error: BaseException) -> str | None:
    state: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg, psycopg2
    return state


def _kinds(error: BaseException) -> set[str]:
    """Return the names of an error's classes: the driver has its own for some cases, such as ConnectionTimeout."""
    return {kind.__name__ for kind in type(error).__mro__}


def _is_of_driver(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in {"psycopg", "psycopg2"}


def _told(error: BaseException, database: peewee.Database) -> str:
    """Return the first line of what the driver says, without the password, whatever it quotes."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    with contextlib.suppress(AttributeError):
        password = database.connect_params.get("password")
        text = text.replace(password, "***") if password else text
    return text
