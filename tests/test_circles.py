"""Who can never go on, compared with a search through every order of events: no false alarm, none missed."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from bgsupervisor.circles import Need, circle

TASKS = range(6)
SOURCES = st.frozensets(st.sampled_from(TASKS), max_size=3)
NEEDS = st.dictionaries(st.sampled_from(TASKS), st.lists(SOURCES, min_size=1, max_size=3), max_size=5)


def needs_of(graph):
    """Make needs whose words name their task, their place and their sources."""
    return {
        task: [Need(f"{task}.{place}:{sorted(sources)}", sources) for place, sources in enumerate(found)]
        for task, found in graph.items()
    }


def can_go_on(start, graph):
    """Try every order in which tasks can go on, one at a time, and tell whether *start* is among them in one."""
    seen, todo = set(), [frozenset(TASKS).difference(graph)]
    while todo:
        free = todo.pop()
        if start in free:
            return True
        if free in seen:
            continue
        seen.add(free)
        # Any of these may go on next: each of its needs comes by itself, or from one that goes on.
        able = [task for task in graph.keys() - free if all(not one or one & free for one in graph[task])]
        todo += [free | {task} for task in able]
    return False


@given(NEEDS)
@example({0: [frozenset({0})]})
@example({0: [frozenset({1})], 1: [frozenset({0, 2})]})
@example({0: [frozenset({1})], 1: [frozenset({0, 2})], 2: [frozenset({1})]})
@example({0: [frozenset(), frozenset({1})], 1: [frozenset({1})]})
def test_a_circle_is_told_exactly_when_no_order_of_events_lets_the_task_go_on(graph):
    for start in TASKS:
        assert (circle(start, needs_of(graph)) is None) == can_go_on(start, graph)


@given(NEEDS)
def test_the_circle_that_is_named_is_one(graph):
    needs = needs_of(graph)
    for start in TASKS:
        found = circle(start, needs)
        if found is None:
            continue
        tasks = [task for task, _ in found]
        assert len(set(tasks)) == len(tasks)
        for (task, what), following in zip(found, [*tasks[1:], tasks[0]], strict=True):
            need = next(need for need in needs[task] if need.what == what)
            assert following in need.sources
            assert not any(can_go_on(source, graph) for source in need.sources)


@given(NEEDS, st.integers(min_value=2, max_value=5))
def test_a_ring_is_found_whatever_else_is_waited_for(graph, length):
    ring = {task: [*graph.get(task, []), frozenset({(task + 1) % length})] for task in range(length)}
    assert circle(0, needs_of({**graph, **ring})) is not None


def test_a_permit_that_one_free_holder_may_give_back_is_no_circle():
    waits = {1: [Need("lock", frozenset({2, 3}))], 2: [Need("the end of task 1", frozenset({1}))]}
    assert circle(1, waits) is None
    assert circle(2, waits) is None
    waits[3] = [Need("the end of task 2", frozenset({2}))]
    assert circle(3, waits) == [(2, "the end of task 1"), (1, "lock")]


def test_a_task_that_leads_into_a_circle_is_told_the_circle_without_itself():
    waits = {0: [Need("a", frozenset({1}))], 1: [Need("b", frozenset({2}))], 2: [Need("c", frozenset({1}))]}
    assert circle(0, waits) == [(1, "b"), (2, "c")]


def test_thousands_in_a_row_are_no_circle():
    waits = {number: [Need("next", frozenset({number + 1}))] for number in range(1500)}
    assert circle(0, waits) is None
    assert len(circle(0, {**waits, 1500: [Need("first", frozenset({0}))]})) == 1501
