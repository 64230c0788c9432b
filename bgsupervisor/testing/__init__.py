"""Tests of applications: every task is recorded, or run in the test, and no supervisor hears of it.

pytest loads the plugin, `bgsupervisor.testing.plugin`, wherever bgsupervisor is installed. Under Django's test runner a
Service isolates itself. unittest needs one line, `bgsupervisor.testing.isolate()`, or a `TaskBoxTestCase`.
"""

from bgsupervisor.testing.box import TaskBox
from bgsupervisor.testing.clock import FakeClock
from bgsupervisor.testing.isolation import TaskBoxTestCase, isolate, isolation_off

__all__ = ["FakeClock", "TaskBox", "TaskBoxTestCase", "isolate", "isolation_off"]
