"""The price of new items: what a mixer was told to spend is what known items lose, on lists that nobody looked at."""

import numpy as np
import pytest
import torch

from genrec.training.price import ENTRIES, LOOKED_AT, TOP, Prices


def lists(n: int, seed: int, plain: float = 0.0) -> Prices:
    """Lists whose places are hit twice as often for every other user, who also gets better new items.

    `plain`: how much oftener the generator's own first ten hold the target than these do.
    """
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 2
    shares = np.array([0.5, 1.0])[kind][:, None] * 0.5 / np.arange(2, LOOKED_AT + 2) ** 1.2
    drawn = rng.random(n)[:, None]
    upto = shares.cumsum(1)
    hit = (drawn < upto) & (drawn >= upto - shares)
    known = np.log(shares * np.array([2.0, 1.0])[kind][:, None])  # they look alike: scores are too sure of one kind
    new = np.sort(rng.normal(np.array([-5.0, -4.5])[kind][:, None], 1, (n, TOP)))[:, ::-1].copy()
    first = hit[:, :TOP].any(1)
    own = first | (rng.random(n) < plain * first.mean())
    about = torch.from_numpy(kind)[:, None].float()
    return Prices(
        torch.from_numpy(known).float(), torch.from_numpy(hit), torch.from_numpy(new).float(), about,
        torch.from_numpy(own),
    )  # fmt: skip


def loss(of: Prices, entry: float) -> float:
    """Share of the plain lists' recall that is really lost: a plain loop's count."""
    kept = 0
    for known, hit, new in zip(of.known.tolist(), of.hit.tolist(), of.new.tolist(), strict=True):
        order = sorted([(-k, h) for k, h in zip(known, hit, strict=True)] + [(-x - entry, False) for x in new])
        kept += any(h for _, h in order[:TOP])
    return 1 - kept / int(of.plain.sum())


@pytest.mark.parametrize("price", [0.01, 0.03])
def test_known_items_lose_what_was_agreed(price: float) -> None:
    entry = lists(3000, 0).entry(price)
    found = loss(lists(40_000, 1), entry)
    assert abs(found - price) < 0.25 * price
    alike = lists(3000, 0)
    alike = Prices(alike.known, alike.hit, alike.new, torch.zeros_like(alike.about), alike.plain)
    assert loss(lists(40_000, 1), alike.entry(price)) > found  # it matters whose place it is


def test_what_the_new_order_gains_may_be_spent() -> None:
    """A mixer that orders known items worse has less to give, one whose lists lose more than that has nothing."""
    even = lists(3000, 0)
    worse = lists(3000, 0, plain=0.01)
    assert worse.entry(0.02) < even.entry(0.02)
    assert lists(3000, 0, plain=0.1).entry(0.02) == ENTRIES[0]
    assert loss(even, even.entry(0.0)) == 0


def test_where_nothing_is_hit_nothing_is_lost() -> None:
    made = lists(50, 0)
    nothing = Prices(made.known, torch.zeros_like(made.hit), made.new, made.about, torch.zeros_like(made.plain))
    assert nothing.entry(0.02) == ENTRIES[-1]


def test_short_lists_have_places_to_give_away() -> None:
    made = lists(200, 0)
    few = made.known.clone()
    few[:, 3:] = -torch.inf
    short = Prices(few, made.hit & (few > -torch.inf), made.new[:, :2], made.about, made.plain & made.hit[:, :3].any(1))
    assert short.entry(0.001) == ENTRIES[-1]  # three and two are no ten
