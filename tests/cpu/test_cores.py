"""Work dealt out to cores."""

from __future__ import annotations

import torch

from groupwise.cpu.cores import UNEVEN, even_shares, threads, threads_each


def test_shares_are_as_many_as_are_even() -> None:
    assert even_shares([3, 3, 3, 3], 2) == [[0, 2], [1, 3]]
    assert even_shares([1, 1, 1, 1], 3) == [[0, 2], [1, 3]], "two and two, not two, one and one"
    assert even_shares([1, 1, 1], 2) == [[0, 1, 2]]
    assert even_shares([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert even_shares([4, 2], 2) == [[0, 1]]
    assert even_shares([7], 4) == [[0]]
    assert even_shares([], 4) == [[]]


def test_no_share_is_much_larger_than_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 100, (12,), generator=generator).tolist()
        shares = even_shares(sizes, 4)
        loads = [sum(sizes[i] for i in share) for share in shares]
        assert sorted(i for share in shares for i in share) == list(range(12))
        assert max(loads) <= UNEVEN * sum(sizes) / len(shares)
        assert all(share == sorted(share) for share in shares)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads(3):
        assert torch.get_num_threads() == 3
        assert threads_each(2) == threads_each(5) == 1
    assert torch.get_num_threads() == before
