"""The web server: takes uploads, requests imports, shows their status. It runs no import itself."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask, abort, flash, g, redirect, render_template, request, session, url_for
from order_import import ImportOrders
from orders import DATA, UPLOADS, shop_database, totals, upload_path
from sample import sample_lines

from bgsupervisor import AlreadyLive, NotRetryable, Reason, Service, Status, TaskRecord

if TYPE_CHECKING:
    from datetime import datetime
    from typing import BinaryIO

    from werkzeug import Response

HERE = Path(__file__).absolute().parent
UPLOAD_MAX_BYTES = 10 * 2**20
IMPORTS_SHOWN = 8

WHY = {
    Reason.CANCELLED: "You cancelled this import.",
    Reason.TIMED_OUT: f"It took longer than {ImportOrders.timeout_s / 60:g} minutes. Please divide the file.",
    Reason.OUT_OF_MEMORY: "The import needed more memory than there was. Please divide the file.",
    Reason.STOPPED: "Imports were stopped by the people who run this shop.",
    Reason.HOST_REBOOTED: "Our computer was restarted in the middle of the import.",
    Reason.HOST_LOST: "The computer that worked on the import has gone.",
    Reason.RAISED: "A mistake in our program ended the import. It is not your file's fault, and we have the details.",
}
"""Messages to a shop owner; `bgsupervisor show ID` has the facts for the people who run the shop."""
OTHERWISE = "The import was cut off by something on our side."

service = Service(config=HERE / "bgsupervisor.toml")
app = Flask(__name__)


def _secret_key() -> bytes:
    """Return the key that signs the sessions; made once, and the same for all web processes."""
    DATA.mkdir(exist_ok=True)
    path = DATA / "secret"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=DATA, delete=False) as file:
            file.write(secrets.token_bytes(32))
        try:
            os.link(file.name, path)  # fails if another process was first, and then its key is used
        except FileExistsError:
            pass
        finally:
            os.unlink(file.name)  # noqa: PTH108 - as link
    return path.read_bytes()


app.config.update(
    SECRET_KEY=_secret_key(),
    MAX_CONTENT_LENGTH=UPLOAD_MAX_BYTES,
    SESSION_COOKIE_SAMESITE="Lax",  # another site's form cannot upload or cancel in this user's name
)


# ---- identity ----


@app.before_request
def know_user() -> Response | None:
    g.user = session.get("user")
    if g.user is None and request.endpoint not in ("sign_in", "static"):
        if request.endpoint == "import_state":
            abort(404)
        return redirect(url_for("sign_in"))
    return None


@app.route("/sign-in", methods=["GET", "POST"])
def sign_in() -> str | Response:
    """Take any name for true: passwords are not what this example is about."""
    name = request.form.get("name", "").strip()
    if request.method == "POST" and 0 < len(name) <= 40:  # noqa: PLR2004 - a name
        session["user"] = name
        return redirect(url_for("home"))
    return render_template("sign_in.html")


@app.post("/sign-out")
def sign_out() -> Response:
    session.clear()
    return redirect(url_for("sign_in"))


# ---- uploads and imports ----


@app.get("/")
def home() -> str:
    imports = service.list(name=ImportOrders, key=g.user, limit=IMPORTS_SHOWN)
    with shop_database() as database:
        count, cents = totals(database, g.user)
    return render_template("home.html", imports=imports, count=count, cents=cents)


@app.get("/sample.csv")
def sample() -> Response:
    headers = {"Content-Disposition": "attachment; filename=orders.csv"}
    return app.response_class(sample_lines(), mimetype="text/csv", headers=headers)


@app.post("/imports")
def upload() -> Response:
    file = request.files.get("orders")
    if file is None or not file.filename:
        flash("Please choose a file first.")
        return redirect(url_for("home"))
    digest = keep(file.stream)
    # Only the name of the upload goes into the task. `key` says whose it is; `unique` makes a second click on
    # "Import" find the import that the first one has begun, for as long as that has not ended.
    data = {"owner": g.user, "upload": digest}
    handle = service.request(ImportOrders, data, key=g.user, unique=f"{g.user}:{digest}")
    if not handle.created:
        flash("You have sent this very file already; here is its import.")
    return redirect(url_for("import_page", id=handle.id))


def keep(stream: BinaryIO) -> str:
    """Put an upload on the disk, whole or not at all, and return its name: what it is hashed to."""
    UPLOADS.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=UPLOADS, delete=False) as file:
        while chunk := stream.read(2**16):
            digest.update(chunk)
            file.write(chunk)
    Path(file.name).rename(upload_path(digest.hexdigest()))
    return digest.hexdigest()


def own_import(id: int) -> TaskRecord:
    """Return an import of this user; to everybody else it does not exist."""
    record = service.get(id)
    if record is None or record.name != ImportOrders.name or record.key != g.user:
        abort(404)
    return record


@app.get("/imports/<int:id>")
def import_page(id: int) -> str:
    record = own_import(id)
    result = service.result(record.id) if record.status is Status.DONE else None
    return render_template("import.html", state=state_of(record), record=record, result=result)


@app.get("/imports/<int:id>/state")
def import_state(id: int) -> dict[str, Any]:
    """Return what the page asks for twice a second."""
    return state_of(own_import(id))


@app.post("/imports/<int:id>/cancel")
def cancel(id: int) -> Response:
    service.cancel(own_import(id).id, by=g.user)
    return redirect(url_for("import_page", id=id))


@app.post("/imports/<int:id>/retry")
def retry(id: int) -> Response:
    try:
        service.retry(own_import(id).id)
    except AlreadyLive as error:
        id = error.id
        flash("This very file is being imported already; here is its import.")
    except NotRetryable:
        pass  # a second click: it waits or runs by now, and the page says so
    return redirect(url_for("import_page", id=id))


# ---- in the user's words ----


def state_of(record: TaskRecord) -> dict[str, Any]:
    """Return what a browser may see of an import: status, progress and words, ready for JSON."""
    title, words = message_of(record)
    return {**record.public(), "title": title, "words": words}


@app.template_global()
def message_of(record: TaskRecord) -> tuple[str, str]:
    """Return how an import stands, as a title and a sentence."""
    if record.status is Status.REQUEST:
        return "Waiting", _waiting_message(record)
    if record.status is Status.START:
        if record.cancel_requested_at is not None:
            return "Cancelling", "The import is being stopped."
        return "Importing", record.message or "It is about to begin"
    if record.status is Status.DONE:
        return "Finished", ""
    with shop_database() as database:
        saved, _ = totals(database, record.key, record.id)
    kept = f"All its {saved:,} good orders had been saved before." if saved else "None of its orders were saved."
    title = "Cancelled" if record.reason is Reason.CANCELLED else "Not finished"
    return title, f"{WHY.get(record.reason, OTHERWISE)} {kept}"


def _waiting_message(record: TaskRecord) -> str:
    if record.no_supervisor_since is not None:
        return (
            f"No imports have been worked on since {clock_time(record.no_supervisor_since)}. "
            "Yours is safe and starts as soon as they are again; you need not send it a second time."
        )
    if record.position is None or record.position == 1:
        return "Yours is next."
    ahead = record.position - 1
    return f"{ahead} {'import comes' if ahead == 1 else 'imports come'} before yours."


@app.template_filter()
def clock_time(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


@app.template_filter()
def money(cents: int) -> str:
    return f"{cents / 100:,.2f}"


@app.errorhandler(404)
def not_found(_: Exception) -> tuple[str, int]:
    return render_template("problem.html", title="Not found", words="There is no such page, or it is not yours."), 404


@app.errorhandler(413)
def too_large(_: Exception) -> tuple[str, int]:
    words = f"A file may have at most {UPLOAD_MAX_BYTES // 2**20} MiB. Please divide it."
    return render_template("problem.html", title="Too large", words=words), 413
