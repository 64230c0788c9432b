"""What each message to the supervisor changes; writes no rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from bgsupervisor.ipc import messages
from bgsupervisor.ledger.attempts import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from bgsupervisor.clock import Clock
    from bgsupervisor.supervisor.children import ChildHandle, Children
    from bgsupervisor.supervisor.events import EventSources, Peer
    from bgsupervisor.supervisor.forkservers import ForkServers
    from bgsupervisor.supervisor.presence import Presence
    from bgsupervisor.supervisor.recovery import Recovery
    from bgsupervisor.supervisor.scheduling import Scheduler
    from bgsupervisor.supervisor.termination import Terminations
    from bgsupervisor.supervisor.wait_manager import WaitManager

__all__ = ["Inbox"]


@dataclasses.dataclass(eq=False, kw_only=True)
class Inbox:
    """Hands each message to its handler, by its type.

    Attributes:
        reload: Loads configuration and code anew, for a caller that waits for the answer.
    """

    children: Children
    fork_servers: ForkServers
    recovery: Recovery
    terminations: Terminations
    wait_manager: WaitManager
    scheduler: Scheduler
    presence: Presence
    sources: EventSources
    clock: Clock
    reload: Callable[[bool, Peer | None], None]

    def __post_init__(self) -> None:
        """Set up the two tables of handlers."""
        self._by_type: dict[type, Callable[[Peer, Any], None]] = {
            messages.ChildHello: self.on_child_hello,
            messages.ForkServerHello: self.on_fork_server_hello,
            messages.Exited: self.on_exited,
            messages.Spawned: self.on_spawned,
            messages.SpawnFailed: self.on_spawn_failed,
            messages.Reload: self.on_reload,
            messages.WaitManagerHello: self.wait_manager.take,
            messages.WaitManagerBeat: self.wait_manager.take,
            messages.Notify: self.wait_manager.take,
        }
        self._by_type_of_child: dict[type, Callable[[ChildHandle, Any], None]] = {
            messages.Waiting: self.on_waiting,
            messages.Resumed: self.on_waiting,
            messages.WantSlot: self.on_waiting,
            messages.ResultReport: self.on_result,
            messages.Beat: self.on_beat,
            messages.Progress: self.on_beat,
        }

    def take(self, peer: Peer, message: messages.Message) -> None:
        """Take in one message; one of a type that has no handler, or of an unknown child, is ignored."""
        if type(message) in self._by_type:
            self._by_type[type(message)](peer, message)
            return
        child = self.children.get(peer.ref)
        if child is not None and type(message) in self._by_type_of_child:
            self._by_type_of_child[type(message)](child, message)

    def on_exited(self, _: Peer, message: messages.Exited) -> None:
        """Keep an exit until no task depends on it."""
        self.fork_servers.exits[message.ref] = message
        self.fork_servers.met(message.ref)

    def on_spawned(self, peer: Peer, message: messages.Spawned) -> None:
        """Expect the hello of a child that was forked."""
        self.fork_servers.take_spawned(peer, message)
        self.children.vouch_for([message.ref])
        if message.ref in self.children:
            self.fork_servers.met(message.ref)  # its own hello came first, by another socket

    def on_spawn_failed(self, peer: Peer, message: messages.SpawnFailed) -> None:
        """Order no more children for a moment."""
        self.fork_servers.take_spawn_failure(peer, message)
        self.scheduler.pause_spawning()

    def on_reload(self, peer: Peer, message: messages.Reload) -> None:
        """Load configuration and code anew."""
        self.reload(message.force, peer)

    def on_child_hello(self, peer: Peer, hello: messages.ChildHello) -> None:
        """Get to know a child, or what one does whose connection is new."""
        self.fork_servers.met(hello.ref)
        self.children.vouch_for([hello.ref])
        child = self.children.meet(self.recovery.identity_of(hello.ref))
        child.connect(peer, hello)
        if hello.end is None:
            child.leave_by = None
        child.got_on_at = self.clock.monotonic()  # what it said before may not have been heard
        if hello.id is None:
            # It has read its last connection to the end: what was claimed for it, and is not in its hands, never began.
            child.says = None
            if child.end is not None:
                child.become_free()  # it has recorded its end itself, else it would not be idle
            elif child.attempt is not None:
                self.recovery.not_started.add(child.attempt)
            return
        said = Attempt(hello.id, hello.attempt)
        if child.attempt != said:
            child.says = said
            self.recovery.repeat()
        elif child.termination is not None:
            self.terminations.ask(child, child.termination)  # it may not have heard it before it dialled
        if hello.end is not None:
            child.end = hello.end

    def on_fork_server_hello(self, peer: Peer, hello: messages.ForkServerHello) -> None:
        """Get to know a fork server, its children and their exits."""
        self.fork_servers.exits.update({exited.ref: exited for exited in hello.exits})
        self.children.vouch_for(hello.children)
        if self.fork_servers.take_hello(peer, hello):
            self.scheduler.queue_changed = True
            self.scheduler.send_away_unneeded()
        self.presence.renew()

    def on_result(self, child: ChildHandle, message: messages.ResultReport) -> None:
        """Keep how an attempt ended until that is committed."""
        attempt = Attempt(message.id, message.attempt)
        if attempt in (child.attempt, child.says):
            child.end = message.end
            if attempt != child.attempt:
                self.recovery.repeat()  # only the rows show what became of it
            # guard: the acknowledgement follows the commit
            return
        # guard: a superseded end is acknowledged
        if child.peer is not None:
            self.sources.send(child.peer, messages.Ack(attempt.id, attempt.attempt))

    def on_waiting(self, child: ChildHandle, message: messages.Waiting | messages.Resumed | messages.WantSlot) -> None:
        """Note that a body waits without a slot, continues with one, or wants one again."""
        if Attempt(message.id, message.attempt) not in (child.attempt, child.says):
            return
        child.run_place = None  # it has read its assignment: it reports on it
        child.wants_slot = message.number if isinstance(message, messages.WantSlot) else None
        child.got_on_at = self.clock.monotonic()
        if isinstance(message, messages.Waiting):
            child.slot = child.slot if message.slot_kept else None
            self.wait_manager.want()
        elif isinstance(message, messages.Resumed):
            child.slot = message.slot

    def on_beat(self, child: ChildHandle, message: messages.Beat | messages.Progress) -> None:
        """Note that a body lives, and how far it is."""
        if child.attempt != Attempt(message.id, message.attempt):
            return
        child.run_place = None  # it has read its assignment: it reports on it
        child.note.heartbeat_at = self.clock.now()
        if isinstance(message, messages.Progress):
            child.got_on_at = self.clock.monotonic()
            child.note.progress_done = message.done
            child.note.progress_total = message.total
            child.note.message = message.message
