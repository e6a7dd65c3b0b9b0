"""Token buckets against a clock that the test turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.serving.bodies import MAX_BEAMS
from genrec.serving.rate_limit import BURST_S, Bucket, RateLimiter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    granted = [limiter.take("shop", "requests", 1, 2.0) for _ in range(2 * BURST_S + 1)]
    assert granted == [0.0] * 2 * BURST_S + [pytest.approx(0.5)]
    clock.now += 0.5
    assert limiter.take("shop", "requests", 1, 2.0) == 0.0
    assert limiter.take("shop", "requests", 1, 2.0) > 0


def test_tenants_and_kinds_have_buckets_of_their_own() -> None:
    limiter = RateLimiter(Clock())
    while limiter.take("shop", "requests", 1, 1.0) == 0.0:
        pass
    assert limiter.take("news", "requests", 1, 1.0) == 0.0
    assert limiter.take("shop", "beams", 50, 1.0) == 0.0
    assert limiter.take("shop", "tokens", 10**9, None) == 0.0  # no limit


def test_the_largest_request_is_granted_at_any_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    assert limiter.take("shop", "beams", MAX_BEAMS, 1.0) == 0.0
    wait_s = limiter.take("shop", "beams", MAX_BEAMS, 1.0)
    assert wait_s == pytest.approx(MAX_BEAMS)
    clock.now += wait_s
    assert limiter.take("shop", "beams", MAX_BEAMS, 1.0) == 0.0


def test_a_changed_limit_counts_at_once() -> None:
    limiter = RateLimiter(Clock())
    while limiter.take("shop", "requests", 1, 1.0) == 0.0:
        pass
    assert limiter.take("shop", "requests", 1, 100.0) == 0.0


@given(
    rate=st.floats(0.1, 1000),
    steps=st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 300)), min_size=1, max_size=50),
)
def test_no_order_of_requests_and_clock_jumps_exceeds_burst_and_rate(rate, steps) -> None:
    bucket, now, granted, forward = Bucket(rate, 300.0, 300.0, 0.0), 0.0, 0.0, 0.0
    for jump, amount in steps:
        now += jump
        forward += max(0.0, jump)
        if bucket.take(amount, now) == 0.0:
            granted += amount
    assert granted <= 300.0 + rate * forward + 1e-6
