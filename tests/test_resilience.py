"""The rules of what is tried again, by themselves: whatever happens, their bounds hold."""

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from druvarpc.resilience import (
    BUDGET_SECONDS,
    Backoff,
    Breaker,
    Circuit,
    Outliers,
    Retry,
    RetryBudget,
)

CHANCES = st.floats(0, 1)
TIMES = st.floats(0, 1000)


# --- pauses ---


@given(st.lists(st.tuples(st.floats(0, 100), CHANCES), max_size=50))
def test_pauses_of_backoff_are_bounded_and_double(attempts):
    backoff = Backoff(0.1, 30.0)
    now = 0.0
    for wait, chance in attempts:
        now = max(now + wait, backoff.at)
        before, held = backoff.pause, now > backoff.at + backoff.pause
        backoff.attempt(now, chance)
        pause = backoff.at - now
        assert -1e-9 <= pause <= (0.1 if held else before) + 1e-9
        assert backoff.pause == min(2 * (0.1 if held else before), 30.0)


def test_a_connection_that_held_begins_anew():
    backoff = Backoff(1.0, 30.0)
    for now in range(10):
        backoff.attempt(now, 0.0)
    assert backoff.pause == 30.0
    backoff.attempt(9 + 31, 1.0)
    assert backoff.at == 41


@given(st.integers(1, 100_000), CHANCES, st.none() | st.floats(0, 100))
def test_pauses_of_retries(failed, chance, asked):
    retry = Retry(attempts=50_000, first_pause=0.05, longest_pause=10.0)
    pause = retry.pause(failed, chance, asked)
    if failed >= 50_000 or (asked is not None and asked > 10.0):
        assert pause is None
    else:
        assert pause is not None
        least = asked or 0.0
        assert least <= pause <= least + min(10.0, 0.05 * 2 ** min(failed - 1, 60))


def test_pauses_without_chance():
    retry = Retry(attempts=9, first_pause=1.0, longest_pause=5.0)
    pauses = [retry.pause(failed, 1.0, None) for failed in range(1, 10)]
    assert pauses == [1, 2, 4, 5, 5, 5, 5, 5, None]


# --- the budget ---


@given(
    st.floats(0, 1),
    st.floats(0, 100),
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 1000), st.integers(1, 50))),
)
def test_a_budget_is_never_overdrawn(ratio, least, steps):
    budget = RetryBudget(ratio, least, 0.0)
    now, calls, retries = 0.0, 0, 0
    for wait, fresh, wanted in steps:
        now += wait
        calls += fresh
        if budget.take(wanted, calls, now):
            retries += wanted
        assert budget.balance(calls, now) >= -1e-6
        assert retries <= ratio * calls + least * (now + BUDGET_SECONDS) + 1e-6


def test_a_budget_is_a_part_of_a_steady_load():
    budget = RetryBudget(0.2, 0.0, 0.0)
    taken = 0
    for second in range(1, 101):
        while budget.take(1, 100 * second, float(second)):
            taken += 1
    assert taken == pytest.approx(0.2 * 100 * 100, rel=0.05)


def test_a_budget_forgets():
    budget = RetryBudget(0.2, 1.0, 0.0)
    assert budget.balance(0, 0.0) == 10
    assert budget.balance(10_000, 1.0) > 1000
    assert budget.balance(10_000, 200.0) == pytest.approx(10, abs=0.1)


def test_calls_that_came_at_once_count_at_once():
    budget = RetryBudget(0.5, 0.0, 0.0)
    assert budget.balance(100, 0.0) == 50


# --- the circuit ---

RULE = Breaker(failures=3, pause=5.0, longest_pause=12.0)


def opened(times: int = 1) -> Circuit:
    circuit = Circuit(RULE)
    now = 0.0
    for _ in range(times):
        while not circuit.fail(0, now):
            pass
        circuit.open(now)
        assert circuit.until is not None
        now = circuit.until
    return circuit


def test_failures_in_a_row_open_it():
    circuit = Circuit(RULE)
    assert not circuit.fail(0, 0)
    assert not circuit.fail(0, 1)
    assert not circuit.fail(1, 2), "one went well in between"
    assert not circuit.fail(1, 3)
    assert circuit.fail(1, 4)


def test_pauses_grow_up_to_the_longest():
    untils = [opened(times).until for times in range(1, 6)]
    assert untils == [5, 15, 27, 39, 51]


def test_one_call_tries_it_and_tells():
    circuit = opened()
    assert not circuit.admits(0, 0, 4.9)
    assert circuit.admits(0, 0, 5)
    circuit.let_through(0, 0, 5)
    assert not circuit.admits(0, 0, 6)
    assert circuit.admits(0, 1, 6), "it was given up"
    circuit.let_through(0, 1, 6)
    assert not circuit.admits(0, 1, 6)
    assert circuit.admits(1, 1, 7), "it went well"
    assert circuit.until is None
    assert not circuit.fail(1, 8), "and all is forgotten"


def test_a_call_that_nothing_is_heard_of_is_not_waited_for_for_ever():
    circuit = opened()
    circuit.let_through(0, 0, 2)
    assert circuit.admits(0, 0, 5), "that was none: all calls were refused"
    circuit.let_through(0, 0, 5)
    assert not circuit.admits(0, 0, 9.9)
    assert circuit.admits(0, 0, 10)


def test_a_failure_that_comes_late_opens_it_no_longer():
    circuit = opened()
    assert not circuit.fail(0, 1), "of a call from before"
    assert circuit.until == 5
    assert circuit.fail(0, 6)


def test_a_rate_needs_enough_calls():
    circuit = Circuit(Breaker(failures=1000, rate=0.5, least_calls=10))
    assert not any(circuit.fail(good, 0.0) for good in range(4))
    assert circuit.fail(5, 0.0)
    assert circuit.rate(5, 0.0) == 0.5
    assert circuit.rate(5, 10.0) == 0.0


def test_a_rate_is_that_of_a_window():
    circuit = Circuit(Breaker(failures=1000, rate=0.5, window=10, least_calls=4))
    assert not any(circuit.fail(0, 0.0) for _ in range(3))
    assert not circuit.fail(0, 11.0)
    assert circuit.rate(0, 11.0) == 1.0


def test_a_rate_that_others_have_too_is_no_reason():
    circuit = Circuit(Outliers(failures=1000, rate=0.5, least_calls=2))
    assert not any(circuit.fail(0, 0.0, others=0.6) for _ in range(10))
    assert circuit.fail(0, 0.0, others=0.4)


@given(
    st.lists(
        st.tuples(st.sampled_from(["call", "good", "bad", "given up", "wait"]), st.floats(0, 4))
    )
)
def test_a_circuit_never_lets_more_than_one_call_through_until_it_is_well(steps):
    circuit = Circuit(RULE)
    now, good, given_up, under_way = 0.0, 0, 0, 0
    for what, seconds in steps:
        if what == "wait":
            now += seconds
        elif what == "call":
            if circuit.admits(good, given_up, now):
                circuit.let_through(good, given_up, now)
                closed = circuit.until is None
                assert closed or now >= circuit.until
                if not closed:
                    assert not circuit.admits(good, given_up, now)
                under_way += 1
        elif under_way:
            under_way -= 1
            if what == "good":
                good += 1
            elif what == "given up":
                given_up += 1
            elif circuit.fail(good, now):
                circuit.open(now)
                assert circuit.until is not None
                assert now < circuit.until <= now + 12
                assert not circuit.admits(good, given_up, now)
    if circuit.until is not None:
        # Whatever there was: in the end a call is let through, and when it goes well all are.
        given_up += under_way
        now = max(now, circuit.until)
        assert circuit.admits(good, given_up, now)
        circuit.let_through(good, given_up, now)
        assert circuit.admits(good + 1, given_up, now)
        assert circuit.until is None


# --- what can be asked for ---


@pytest.mark.parametrize(
    "make",
    [
        partial(Retry, attempts=0),
        partial(Retry, first_pause=-1),
        partial(Retry, longest_pause=math.inf),
        partial(Retry, budget=1.1),
        partial(Retry, least=math.nan),
        partial(Breaker, failures=0),
        partial(Breaker, rate=0),
        partial(Breaker, window=0),
        partial(Breaker, least_calls=0),
        partial(Breaker, pause=0),
        partial(Breaker, pause=2, longest_pause=1),
        partial(Outliers, most=1.5),
        partial(Outliers, failures=0),
    ],
)
def test_what_is_out_of_range(make):
    with pytest.raises(ValueError, match="must be"):
        make()
