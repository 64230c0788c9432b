"""Checks of where database and state directory lie: rights, file system, room, and whether a deploy replaces them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.doctor.findings import note, ok, wrong
from bgsupervisor.file_trust import dangers
from bgsupervisor.sizes import size
from bgsupervisor.system.users import group_name, user_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.doctor.findings import Result, Site

__all__ = ["code", "deploy_folder", "file_system", "free_space", "rights", "state_directory"]

SPACE_MIN_BYTES = 100 * 1024 * 1024
"""Free space with which running tasks can surely record their ends."""
GROUP_RIGHTS = stat.S_IRGRP | stat.S_IWGRP

NETWORK = re.compile(
    r"(nfs\d?|cifs|smb\w*|ncpfs|afs|9p|ceph|lustre|gpfs|beegfs|ocfs2|gfs2|glusterfs|vboxsf|prl_fs|davfs"
    r"|fuse\.(sshfs|s3fs|gcsfuse|rclone|glusterfs\w*|ceph\w*|mergerfs|davfs\w*|vmhgfs\S*|goofys|juicefs|moosefs|mfs\w*))"
)
"""File systems on which several machines' locks and shared memory do not work as SQLite's WAL needs them."""
PASSING = {
    "overlay": "is the container's own and goes with it; put the database on a volume",
    "tmpfs": "is in memory and gone after a reboot, tasks and all",
    "ramfs": "is in memory and gone after a reboot, tasks and all",
}
RELEASE_LINKS = {"current", "live", "latest", "release", "active", "deployed"}
RELEASE_FOLDERS = {"releases", "versions", "deploys", "deployments"}
RELEASE = re.compile(r"v?\d.*|[0-9a-f]{7,40}")
"""Name of a release's own folder: its time, number or commit."""


def rights(site: Site) -> Iterator[Result]:
    """Check that this user can write the database, and that its group can where the folder is the group's."""
    path = site.database
    if path is None:
        return
    folder, user = path.parent, user_name(os.geteuid())
    if not folder.is_dir():
        yield wrong(f"the folder {folder} of the database does not exist; create it, or set `database` elsewhere")
        return
    files = [one for one in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))) if one.exists()]
    for one in (folder, *files):
        if not os.access(one, os.W_OK):
            yield wrong(f"{one} cannot be written by user {user}, and SQLite needs that; {_mode(one)}")
            return
    yield from _shared(folder, files)


def _shared(folder: Path, files: list[Path]) -> Iterator[Result]:
    """Check that only the right users may write the database: the group that shares its folder, or its owner."""
    state = folder.stat()
    group = group_name(state.st_gid)
    for one in (folder, *files):
        if one.stat().st_mode & stat.S_IWOTH:
            yield wrong(f"every user may write {one}, and so request and cancel tasks; chmod o-w it; {_mode(one)}")
            return
    if not state.st_mode & (stat.S_IWGRP | stat.S_ISGID):
        for one in files:
            if one.stat().st_mode & stat.S_IWGRP:
                yield note(
                    f"group {group_name(one.stat().st_gid)} may write {one}, and so request and cancel tasks, though "
                    f"no group shares {folder}; chmod 600 it, or make the folder setgid; {_mode(one)}"
                )
                return
        yield ok(f"{folder} is for user {user_name(state.st_uid)} alone; {_mode(folder)}")
        return
    if not state.st_mode & stat.S_IWGRP:
        yield note(f"group {group} shares {folder} but may not write it, and SQLite needs that; chmod g+w it")
        return
    for one in files:
        found = one.stat()
        if found.st_mode & GROUP_RIGHTS != GROUP_RIGHTS or found.st_gid != state.st_gid:
            yield wrong(f"group {group} may write {folder} but not {one}; chgrp {group} and chmod 660 it; {_mode(one)}")
            return
    if not state.st_mode & stat.S_ISGID:
        yield note(
            f"{folder} is its group's to write, but not setgid: new files get their maker's own group; chmod g+s it"
        )
    else:
        yield ok(f"group {group} shares {folder}; {_mode(folder)}")


def state_directory(site: Site) -> Iterator[Result]:
    """Check that this user may supervise here."""
    path = site.config.state_dir
    user = user_name(os.geteuid())
    if not path.exists():
        if os.access(path.parent, os.W_OK | os.X_OK):
            yield ok(f"{path} is not there yet; the first `bgsupervisor run` creates it")
        else:
            yield wrong(f"{path} is not there and user {user} cannot create it; create it for the user that supervises")
        return
    owner = user_name(path.stat().st_uid)
    if path.stat().st_uid == os.geteuid():
        found = [wrong(danger) for danger in site.state_dir.dangers()]
        yield from found or [ok(f"{path} is {owner}'s; {_mode(path)}")]
    elif site.alive:
        yield note(f"{path} is {owner}'s, the user that supervises; `run` and `stop` refuse user {user}")
    else:
        yield wrong(f"{path} is {owner}'s, and `run` refuses user {user}; supervise as {owner}")


def code(site: Site) -> Iterator[Result]:
    """Check that no other user may write what the supervisor loads: configuration, env_file, folders of modules."""
    config, state_dir = site.config, site.config.state_dir
    if state_dir.exists() and state_dir.stat().st_uid != os.geteuid():
        yield note(f"only user {user_name(state_dir.stat().st_uid)}, which supervises, can check it")
        return
    folders = list(dict.fromkeys([config.base_dir, *map(Path, config.python_path)]))
    files = [one for one in (config.path, config.env_file) if one is not None]
    found = [*_of_others([*files, *(folder / "*" for folder in folders)]), *_of_groups([*files, *folders])]
    yield from dict.fromkeys(found) or [ok(f"no other user may write what user {user_name(os.geteuid())} loads")]


def _of_others(files: list[Path]) -> Iterator[Result]:
    for file in files:
        for danger in dangers(file):
            tell = wrong if danger.is_of_all else note
            yield tell(f"{danger.detail}; it decides what runs as user {user_name(os.geteuid())}")


def _of_groups(paths: list[Path]) -> Iterator[Result]:
    for path in paths:
        if path.exists() and path.stat().st_mode & stat.S_IWGRP and not _is_own_group(path.stat()):
            group, user = group_name(path.stat().st_gid), user_name(os.geteuid())
            yield note(f"group {group} may write {path}, and so decides what runs as user {user}; {_mode(path)}")


def deploy_folder(site: Site) -> Iterator[Result]:
    """Check that a deploy does not leave the tasks behind in the old release's folder."""
    for what, path in site.places:
        release = _release_of(path)
        if release is not None:
            yield wrong(
                f"{what} {path} lies in {release}, which the next deploy replaces: its tasks would be left behind; "
                "name a path beside the releases"
            )
            return
    if site.database is None:
        yield ok("the state directory lies outside of what a deploy replaces")
    else:
        yield ok(f"{site.database} and the state directory lie outside of what a deploy replaces")


def file_system(site: Site) -> Iterator[Result]:
    """Check that database and state directory are on a file system of this machine."""
    for what, path in site.places:
        kind = _kind(path, site.machine.proc)
        if kind is None:
            yield note(f"the file system of {path} is unknown; it must not be a network file system")
        elif NETWORK.fullmatch(kind):
            yield wrong(f"{what} {path} is on {kind}; it must not be on a network file system, SQLite would lose rows")
        elif kind in PASSING:
            yield note(f"{what} {path} is on {kind}, which {PASSING[kind]}")
        elif kind.startswith("fuse"):
            yield note(f"{what} {path} is on {kind}; make sure that it is not a network file system")
        else:
            yield ok(f"{what} is on {kind}")


def free_space(site: Site) -> Iterator[Result]:
    """Check that there is room for the ends of tasks."""
    folders = {_existing(path).stat().st_dev: _existing(path) for _, path in reversed(site.places)}
    for folder in folders.values():
        state = os.statvfs(folder)
        free = state.f_bavail * state.f_frsize
        room = f"{size(free)} are free for {folder}"
        if free < SPACE_MIN_BYTES:
            yield wrong(f"{room}; free some, or `bgsupervisor prune`: on a full disk no end can be recorded")
        else:
            yield ok(room)


def _existing(path: Path) -> Path:
    """Return the folder that *path* is in, or will be."""
    return next((one for one in path.parents if one.is_dir()), path.parent)


def _release_of(path: Path) -> Path | None:
    """Return the release's folder, or the link to it, that holds *path* once all links are followed."""
    real = path.resolve()
    for folder in reversed(real.parents):
        if folder.parent.name in RELEASE_FOLDERS and RELEASE.fullmatch(folder.name):
            return folder
    for folder in reversed(path.parents):
        if folder.is_symlink() and folder.name in RELEASE_LINKS and real.is_relative_to(folder.resolve()):
            return folder
    return None


def _kind(path: Path, proc: Path) -> str | None:
    """Return the type of the file system of *path*, None if it is not known."""
    real = path.resolve()
    found, length = None, -1
    for line in (proc / "self" / "mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        mounted = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4])
        if real.is_relative_to(mounted) and len(mounted) >= length:  # a later mount covers an earlier one
            found, length = rest.split()[0], len(mounted)
    return found


def _mode(path: Path) -> str:
    state = path.stat()
    return f"it is {user_name(state.st_uid)}:{group_name(state.st_gid)} {stat.S_IMODE(state.st_mode):04o}"


def _is_own_group(found: os.stat_result) -> bool:
    """Whether a file's group is root's, or its owner's own, which many systems give each user."""
    return found.st_gid == 0 or group_name(found.st_gid) == user_name(found.st_uid)
