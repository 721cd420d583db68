import pytest

from backends.grouping import neighbours


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], [[]]),
        ([3], [[3]]),
        ([99], [[99]]),
        ([3, 3, 4, 1], [[3, 3, 4], [1]]),
        ([99, 1, 99, 5, 5, 1], [[99], [1], [99], [5, 5], [1]]),
        ([0, 0, 10, 0], [[0, 0, 10, 0]]),
    ],
)
def test_neighbours_within_a_limit(sizes, groups):
    assert [[sizes[i] for i in group] for group in neighbours(iter(sizes), 10)] == groups
