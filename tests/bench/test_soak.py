"""The soak bench: steady growth is seen, and what the warm-up adds is not taken for it."""

from __future__ import annotations

from soak import State, growth


def test_what_the_warm_up_adds_is_no_growth() -> None:
    warming = [State(100.0 + 50 * number, 3 + number, 1 + number) for number in range(10)]
    states = warming + [State(600.0, 13, 11)] * 20

    added = growth(states)

    assert added == State(0.0, 0, 0)


def test_steady_growth_is_seen() -> None:
    states = [State(100.0 + number, 3 + number, 1) for number in range(30)]

    added = growth(states)

    assert added == State(15.0, 15, 0)


def test_one_round_with_much_memory_is_no_growth() -> None:
    states = [State(900.0 if number == 29 else 100.0, 3, 1) for number in range(30)]

    assert growth(states) == State(0.0, 0, 0)
