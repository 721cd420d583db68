import numpy as np
import pytest

from backends.turns import Job, Piece, Turns, halve


def job(*lengths, name=None):
    return Job(name or str(lengths), np.array(lengths, np.int64))


def taken(turns):
    """[(name, places)] of one turn."""
    return [(piece.job.content, piece.places.tolist()) for piece in turns.take()]


def test_a_turn_holds_as_many_requests_as_fit():
    turns = Turns(10)
    for one in (job(4, name="a"), job(3, name="b"), job(3, name="c"), job(1, name="d")):
        turns.add(one)
    # The fewest tokens first; equal ones as they came.
    assert taken(turns) == [("d", [0]), ("b", [0]), ("c", [0])]
    assert taken(turns) == [("a", [0])]
    assert taken(turns) == []


def test_a_long_request_takes_turns_longest_texts_first():
    turns = Turns(10)
    turns.add(job(2, 9, 30, 2, 8, 1))
    found = [places for turn in iter(lambda: taken(turns), []) for _, places in turn]
    assert found == [[2], [1], [0, 4], [3, 5]]


def test_short_and_old_requests_begin_in_turn():
    turns = Turns(10)
    turns.add(job(*[10] * 4, name="old"))
    for number in range(3):
        turns.add(job(9, name=f"short {number}"))
    order = [turn[0][0] for turn in iter(lambda: taken(turns), [])]
    assert order == ["short 0", "old", "short 1", "old", "short 2", "old", "old"]


def test_a_request_that_must_stay_whole_runs_alone_or_with_others_that_fit():
    turns = Turns(10, is_whole=True)
    for one in (job(8, 8, name="large"), job(2, 3, name="a"), job(6, name="b"), job(4, name="c")):
        turns.add(one)
    assert taken(turns) == [("c", [0]), ("a", [0, 1])]
    assert taken(turns) == [("large", [0, 1])]
    assert taken(turns) == [("b", [0])]


def test_a_dropped_request_does_not_come_again():
    turns = Turns(10)
    gone, stays = job(10, 10, name="gone"), job(10, 10, name="stays")
    turns.add(gone)
    turns.add(stays)
    assert taken(turns) == [("gone", [0])]
    turns.drop([gone])
    assert [taken(turns), taken(turns), taken(turns)] == [[("stays", [0])], [("stays", [1])], []]
    assert len(turns) == 0


@pytest.mark.parametrize("is_whole", [False, True])
def test_every_text_is_taken_once_and_turns_keep_to_their_budget(is_whole):
    generator = np.random.default_rng(0)
    turns = Turns(64, is_whole=is_whole)
    left = {}
    for number in range(200):
        lengths = generator.integers(0, 90, generator.integers(1, 9))
        left[number] = set(range(len(lengths)))
        turns.add(Job(number, lengths))
        for piece in turns.take() if number % 2 else ():
            left[piece.job.content] -= set(piece.places.tolist())
    while pieces := turns.take():
        sizes = [int(piece.job.lengths[piece.places].sum()) for piece in pieces]
        is_alone = len(pieces) == 1 and (
            is_whole or np.count_nonzero(pieces[0].job.lengths[pieces[0].places]) == 1
        )
        assert sum(sizes) <= 64 or is_alone
        for piece in pieces:
            assert set(piece.places.tolist()) <= left[piece.job.content]
            left[piece.job.content] -= set(piece.places.tolist())
    assert not any(left.values())


def test_what_is_computed_once_makes_room_for_more():
    def measure(pieces):
        """Of each request all but one token of its texts are shared."""
        return sum(int(piece.job.lengths[0]) - 1 + len(piece.places) for piece in pieces)

    turns = Turns(12, reach=4, measure=measure)
    turns.add(job(*[10] * 9, name="a"))
    turns.add(job(10, name="b"))
    # Alone, "b" fills the turn: of "a" there is room for nothing.
    assert taken(turns) == [("b", [0])]
    # Up to four texts are looked at, and halved until they fit.
    found = [places for turn in iter(lambda: taken(turns), []) for _, places in turn]
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7, 8]]
    assert len(turns) == 0


def test_what_was_given_back_keeps_its_place():
    turns = Turns(10, reach=3, measure=lambda pieces: sum(10 * len(piece.places) for piece in pieces))
    for name in "abc":
        turns.add(job(10, name=name))
    assert [taken(turns) for _ in range(4)] == [[("a", [0])], [("b", [0])], [("c", [0])], []]


def test_a_turn_is_cut_between_requests_and_a_request_between_its_sequences():
    one, two, three = (Piece(Job(name, np.ones(3, np.int64)), np.arange(3)) for name in "abc")
    assert halve([one, two, three], is_whole=False) == [[one], [two, three]]
    first, second = halve([one], is_whole=False)
    assert [piece.places.tolist() for piece in (*first, *second)] == [[0], [1, 2]]
    assert len(halve([Piece(one.job, np.array([1]))], is_whole=False)) == 1
    assert halve([one], is_whole=True) == [[one]]
    assert halve([one, two], is_whole=True) == [[one], [two]]
