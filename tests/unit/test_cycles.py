"""Who can never go on, compared with a search through every order of events: no false alarm, none missed."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from bgsupervisor.ledger.cycles import WaitEdge, cycle

TASKS = range(6)
# (sources, needed): a source that can bring it about more than once stands there as often.
SOURCES = st.lists(st.sampled_from(TASKS), min_size=1, max_size=4).flatmap(
    lambda sources: st.tuples(st.just(tuple(sources)), st.integers(1, len(sources)))
)
NEEDS = st.dictionaries(st.sampled_from(TASKS), st.lists(SOURCES, min_size=1, max_size=3), max_size=5)


def edges_of(graph):
    """Make needs whose words name their task, their place and their sources."""
    return {
        task: [WaitEdge(f"{task}.{place}:{sorted(sources)}", sources, n) for place, (sources, n) in enumerate(found)]
        for task, found in graph.items()
    }


def any_of(*sources):
    return sources, 1


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
        # Any of these may go on next: enough of those that go on bring about each of its needs.
        able = [
            task
            for task in graph.keys() - free
            if all(len([source for source in sources if source in free]) >= n for sources, n in graph[task])
        ]
        todo += [free | {task} for task in able]
    return False


@given(NEEDS)
@example({0: [any_of(0)]})
@example({0: [any_of(1)], 1: [any_of(0, 2)]})
@example({0: [any_of(1)], 1: [any_of(0, 2)], 2: [any_of(1)]})
@example({0: [any_of(2), any_of(1)], 1: [any_of(1)]})
@example({0: [((1, 2), 2)], 1: [any_of(0)]})
@example({0: [((1, 2, 2), 2)], 1: [any_of(0)]})
def test_a_cycle_is_told_exactly_when_no_order_of_events_lets_the_task_go_on(graph):
    for start in TASKS:
        assert (cycle(start, edges_of(graph)) is None) == can_go_on(start, graph)


@given(NEEDS)
def test_the_cycle_that_is_named_is_one(graph):
    edges = edges_of(graph)
    for start in TASKS:
        found = cycle(start, edges)
        if found is None:
            continue
        tasks = [task for task, _ in found]
        assert len(set(tasks)) == len(tasks)
        for (task, what), following in zip(found, [*tasks[1:], tasks[0]], strict=True):
            edge = next(edge for edge in edges[task] if edge.what == what)
            assert following in edge.sources
            assert sum(can_go_on(source, graph) for source in edge.sources) < edge.needed
            assert not can_go_on(following, graph)


@given(NEEDS, st.integers(min_value=2, max_value=5))
def test_a_wake_up_is_found_whatever_else_is_waited_for(graph, length):
    ring = {task: [*graph.get(task, []), any_of((task + 1) % length)] for task in range(length)}
    assert cycle(0, edges_of({**graph, **ring})) is not None


def test_a_permit_that_one_free_holder_may_give_back_is_no_cycle():
    waits = {1: [WaitEdge("lock", frozenset({2, 3}))], 2: [WaitEdge("the end of task 1", frozenset({1}))]}
    assert cycle(1, waits) is None
    assert cycle(2, waits) is None
    waits[3] = [WaitEdge("the end of task 2", frozenset({2}))]
    assert cycle(3, waits) == [(2, "the end of task 1"), (1, "lock")]


def test_a_task_that_leads_into_a_cycle_is_told_the_cycle_without_itself():
    waits = {0: [WaitEdge("a", frozenset({1}))], 1: [WaitEdge("b", frozenset({2}))], 2: [WaitEdge("c", frozenset({1}))]}
    assert cycle(0, waits) == [(1, "b"), (2, "c")]


def test_thousands_in_a_row_are_no_cycle():
    waits = {number: [WaitEdge("next", frozenset({number + 1}))] for number in range(1500)}
    assert cycle(0, waits) is None
    assert len(cycle(0, {**waits, 1500: [WaitEdge("first", frozenset({0}))]})) == 1501
