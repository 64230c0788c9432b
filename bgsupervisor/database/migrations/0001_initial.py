"""The first tables: tasks, their interruptions, supervisors, and what tasks wait for."""

from typing import Any

from bgsupervisor.database.migrations.dialects import is_postgres, put

# A frozen copy, independent of models.py: what a migration does never changes. Defaults stand in the database so
# that a row written by hand needs a name and data only.

NOW = "(strftime('%Y-%m-%d %H:%M:%f000+00:00', 'now'))"


def is_time(column: str) -> str:
    """Return the condition that a text is a time of the calendar in UTC, written so that texts sort as times do."""
    return f"""datetime(substr("{column}", 1, 19), '+0 days') IS substr("{column}", 1, 19)
        AND replace(substr("{column}", 20), '+00:00', '') NOT GLOB '*[^.0-9]*'"""


TASK = f"""
CREATE TABLE "{{p}}task" (
    "id" INTEGER PRIMARY KEY AUTOINCREMENT,
    "name" TEXT NOT NULL CHECK (typeof("name") = 'text'),
    "data" TEXT NOT NULL CHECK (typeof("data") = 'text') DEFAULT '{{{{}}}}',
    "queue" TEXT NOT NULL DEFAULT 'default',
    "priority" INTEGER NOT NULL DEFAULT 0 CHECK (typeof("priority") = 'integer'),
    "status" TEXT NOT NULL DEFAULT 'REQUEST' CHECK ("status" IN ('REQUEST', 'START', 'DONE', 'INTERRUPTED')),
    "reason" TEXT CHECK ("reason" IS NULL OR "status" = 'INTERRUPTED'),
    "detail" TEXT,
    "key" TEXT CHECK (typeof("key") <> 'blob'),
    "unique_key" TEXT CHECK (typeof("unique_key") <> 'blob'),
    "serial" TEXT,
    "run_at" TEXT NOT NULL DEFAULT {NOW} CHECK ({is_time("run_at")}),
    "expires_at" TEXT,
    "requested_at" TEXT NOT NULL DEFAULT {NOW} CHECK ({is_time("requested_at")}),
    "started_at" TEXT,
    "started_mono" REAL,
    "ended_at" TEXT,
    "heartbeat_at" TEXT,
    "attempt" INTEGER NOT NULL DEFAULT 0 CHECK (typeof("attempt") = 'integer'),
    "tries" INTEGER NOT NULL DEFAULT 0,
    "max_attempts" INTEGER NOT NULL DEFAULT 1,
    "ending" TEXT,
    "host" TEXT,
    "boot_id" TEXT,
    "pid_ns" INTEGER CHECK (typeof("pid_ns") IN ('integer', 'null')),
    "pid" INTEGER CHECK (typeof("pid") IN ('integer', 'null')),
    "start_ticks" INTEGER CHECK (typeof("start_ticks") IN ('integer', 'null')),
    "slot" INTEGER CHECK ("slot" IS NULL OR "slot" >= 0),
    "progress_done" REAL,
    "progress_total" REAL,
    "message" TEXT,
    "result" TEXT,
    "error" TEXT,
    "exit_code" INTEGER,
    "signal" INTEGER,
    "cpu_s" REAL,
    "cpu_percent" REAL,
    "rss_bytes" INTEGER,
    "peak_rss_bytes" INTEGER,
    "cancel_requested_at" TEXT,
    "cancel_requested_by" TEXT,
    "suspend_requested_at" TEXT,
    "suspend_requested_by" TEXT,
    "suspended_at" TEXT,
    "suspended_mono" REAL,
    "suspended_s" REAL,
    "stack" TEXT,
    "parent_id" INTEGER,
    CHECK ("status" <> 'INTERRUPTED' OR "reason" IS NOT NULL)
)
"""

INTERRUPTION = """
CREATE TABLE "{p}interruption" (
    "id" INTEGER PRIMARY KEY AUTOINCREMENT,
    "task_id" INTEGER NOT NULL,
    "attempt" INTEGER NOT NULL,
    "reason" TEXT NOT NULL,
    "detail" TEXT,
    "error" TEXT,
    "stack" TEXT,
    "exit_code" INTEGER,
    "signal" INTEGER,
    "host" TEXT,
    "pid" INTEGER,
    "started_at" TEXT,
    "ended_at" TEXT NOT NULL
)
"""

SUPERVISOR = """
CREATE TABLE "{p}supervisor" (
    "host" TEXT PRIMARY KEY,
    "boot_id" TEXT NOT NULL,
    "pid_ns" INTEGER NOT NULL,
    "pid" INTEGER NOT NULL,
    "start_ticks" INTEGER NOT NULL,
    "started_at" TEXT NOT NULL,
    "heartbeat_at" TEXT NOT NULL,
    "slots" INTEGER NOT NULL,
    "version" TEXT NOT NULL,
    "catalogue" TEXT NOT NULL,
    "code_error" TEXT,
    "left_at" TEXT
)
"""

PART = """
CREATE TABLE "{p}part" (
    "id" INTEGER PRIMARY KEY AUTOINCREMENT,
    "task_id" INTEGER NOT NULL,
    "name" TEXT NOT NULL,
    "value" TEXT NOT NULL,
    "reached_at" TEXT NOT NULL
)
"""

# A permit whose holder died stays as a row without a task: the next holder is told that it was abandoned.
HOLD = """
CREATE TABLE "{p}hold" (
    "id" INTEGER PRIMARY KEY AUTOINCREMENT,
    "name" TEXT NOT NULL,
    "permit" INTEGER NOT NULL,
    "task_id" INTEGER,
    "attempt" INTEGER,
    "since" TEXT NOT NULL,
    "abandoned_by" INTEGER
)
"""

# In the order of their ids waiters are served. kind: part, end, lock, barrier, slot. An async body can have several
# waits at once, which "number" tells apart; "whole" says that nothing of the body goes on beside this one.
WAIT = """
CREATE TABLE "{p}wait" (
    "id" INTEGER PRIMARY KEY AUTOINCREMENT,
    "task_id" INTEGER NOT NULL,
    "attempt" INTEGER NOT NULL,
    "number" INTEGER NOT NULL DEFAULT 0,
    "whole" INTEGER NOT NULL DEFAULT 1,
    "kind" TEXT NOT NULL CHECK ("kind" IN ('part', 'end', 'lock', 'barrier', 'slot')),
    "target_id" INTEGER,
    "target" TEXT,
    "permits" INTEGER,
    "since" TEXT NOT NULL
)
"""

# Only what is still to come: a row goes when the other task has ended as it must.
DEPENDENCY = """
CREATE TABLE "{p}dependency" (
    "id" INTEGER PRIMARY KEY AUTOINCREMENT,
    "task_id" INTEGER NOT NULL,
    "on_id" INTEGER NOT NULL,
    "any_end" INTEGER NOT NULL DEFAULT 0
)
"""

# One row per participant of the present generation; the last one that arrives takes all rows away at once.
PARTY = """
CREATE TABLE "{p}participant" (
    "id" INTEGER PRIMARY KEY AUTOINCREMENT,
    "scope" TEXT NOT NULL,
    "name" TEXT NOT NULL,
    "generation" INTEGER NOT NULL,
    "task_id" INTEGER NOT NULL,
    "attempt" INTEGER NOT NULL,
    "parties" INTEGER NOT NULL,
    "outcome" TEXT
)
"""

# Every index has an explicit name: Peewee gives a plain and a partial index on one column the same one and skips the
# second. The first two are laws: a slot is taken once, a unique key is live once.
INDEXES = (
    """CREATE UNIQUE INDEX "{p}task_slot" ON "{p}task" ("host", "slot")
       WHERE "status" = 'START' AND "slot" IS NOT NULL""",
    """CREATE UNIQUE INDEX "{p}task_unique" ON "{p}task" ("name", "unique_key")
       WHERE "status" IN ('REQUEST', 'START')""",
    """CREATE INDEX "{p}task_due" ON "{p}task" ("priority" DESC, "run_at", "id") WHERE "status" = 'REQUEST'""",
    """CREATE INDEX "{p}task_run_at" ON "{p}task" ("run_at") WHERE "status" = 'REQUEST'""",
    """CREATE INDEX "{p}task_start" ON "{p}task" ("id") WHERE "status" = 'START'""",
    """CREATE INDEX "{p}task_name" ON "{p}task" ("name", "id")""",
    """CREATE INDEX "{p}task_key" ON "{p}task" ("key", "id") WHERE "key" IS NOT NULL""",
    """CREATE INDEX "{p}task_parent" ON "{p}task" ("parent_id") WHERE "parent_id" IS NOT NULL""",
    """CREATE INDEX "{p}task_ended" ON "{p}task" ("ended_at") WHERE "ended_at" IS NOT NULL""",
    """CREATE INDEX "{p}interruption_task" ON "{p}interruption" ("task_id", "attempt")""",
    'CREATE UNIQUE INDEX "{p}part_name" ON "{p}part" ("task_id", "name")',
    'CREATE UNIQUE INDEX "{p}hold_permit" ON "{p}hold" ("name", "permit")',
    'CREATE INDEX "{p}hold_task" ON "{p}hold" ("task_id")',
    'CREATE INDEX "{p}wait_task" ON "{p}wait" ("task_id")',
    'CREATE INDEX "{p}wait_target" ON "{p}wait" ("kind", "target")',
    'CREATE UNIQUE INDEX "{p}dependency_pair" ON "{p}dependency" ("task_id", "on_id")',
    'CREATE INDEX "{p}dependency_on" ON "{p}dependency" ("on_id")',
    'CREATE UNIQUE INDEX "{p}participant_once" ON "{p}participant" ("scope", "name", "generation", "task_id")',
    'CREATE INDEX "{p}participant_task" ON "{p}participant" ("task_id")',
)


# For PostgreSQL alone: whoever commits a request, or what is wanted of a task, also by hand, wakes who listens.
WAKE = (
    """CREATE FUNCTION "{p}wake"() RETURNS trigger LANGUAGE plpgsql AS
       $$ BEGIN PERFORM pg_notify(TG_ARGV[0], ''); RETURN NULL; END $$""",
    """CREATE TRIGGER "{p}task_requested" AFTER INSERT ON "{p}task"
       FOR EACH STATEMENT EXECUTE FUNCTION "{p}wake"('{p}wake')""",
    """CREATE TRIGGER "{p}task_asked" AFTER UPDATE ON "{p}task" FOR EACH ROW
       WHEN (OLD."status" = 'INTERRUPTED' AND NEW."status" = 'REQUEST'
             OR OLD."status" = 'START' AND NEW."status" = 'START'
             AND (OLD."cancel_requested_at" IS DISTINCT FROM NEW."cancel_requested_at"
                  OR OLD."suspend_requested_at" IS DISTINCT FROM NEW."suspend_requested_at"))
       EXECUTE FUNCTION "{p}wake"('{p}wake')""",
)


def up(migrator: Any, db: Any) -> None:  # noqa: ANN401 - the runner has no types
    """Create the tables and their laws."""
    for statement in (TASK, INTERRUPTION, SUPERVISOR, PART, HOLD, WAIT, DEPENDENCY, PARTY, *INDEXES):
        db.execute_sql(put(statement.format(p=migrator.table_prefix), db))
    for statement in WAKE if is_postgres(db) else ():
        db.execute_sql(statement.format(p=migrator.table_prefix))
