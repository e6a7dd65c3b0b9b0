import numpy as np
import pytest

from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.interactions import Log
from genrec.splits import Split, split_log

DEFAULTS = {"seed": 0, "max_history": 50, "cold_share": 0.2, "test_share": 0.2, "max_users": None}
NAMES = ["leave_one_out", "temporal", "cold_items"]


def log_of(histories, times=None):
    times = times or [list(range(len(history))) for history in histories]
    return Log(
        user_ids=[f"u{i}" for i in range(len(histories))],
        offsets=np.cumsum([0, *map(len, histories)]).astype(np.int64),
        items=np.concatenate(histories).astype(np.int32),
        times=np.concatenate(times).astype(np.float64),
    )


def random_log(n_users=60, n_items=25, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 15, n_users)
    histories = [rng.integers(0, n_items, n) for n in lengths]
    return log_of(histories, [np.sort(rng.integers(0, 200, n)) for n in lengths])


def split(log, n_items, name, **changes):
    return split_log(log, n_items, name, **(DEFAULTS | changes))


def triples(cases):
    pairs = zip(cases.users, cases.histories, cases.targets, strict=True)
    return {int(user): (history.tolist(), int(target)) for user, history, target in pairs}


def train_of(made):
    return {int(user): history.tolist() for user, history in zip(made.train_users, made.train, strict=True)}


def test_leave_one_out():
    made = split(log_of([[0, 1, 2, 3], [4, 5], [6], [3, 2, 1]]), 8, "leave_one_out")
    assert train_of(made) == {0: [0, 1], 1: [4, 5], 2: [6], 3: [3]}
    assert triples(made.valid) == {0: ([0, 1], 2), 3: ([3], 2)}
    assert triples(made.test) == {0: ([0, 1, 2], 3), 3: ([3, 2], 1)}
    assert made.cold.tolist() == [False, False, True, False, False, False, False, True]


def test_temporal():
    # ten events at times 0..9, a fifth of them (8, 9) tests, the fifth before (6, 7) validates
    log = log_of([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]], [[0, 6, 8], [1, 2, 9], [3, 4, 7], [5]])
    made = split(log, 10, "temporal")
    assert train_of(made) == {0: [0], 1: [3, 4], 2: [6, 7], 3: [9]}
    assert triples(made.valid) == {0: ([0], 1), 2: ([6, 7], 8)}
    assert triples(made.test) == {0: ([0, 1], 2), 1: ([3, 4], 5)}


def test_temporal_never_learns_from_the_future():
    log = random_log(300)
    made = split(log, 25, "temporal")
    cut = np.sort(log.times)[round(0.8 * len(log.times))]
    assert np.mean(log.times >= cut) == pytest.approx(0.2, abs=0.02)
    before = np.sort(log.times)[round(0.6 * len(log.times))]
    for cases, end in ((made.valid, before), (made.test, cut)):
        for user, (history, target) in triples(cases).items():
            times = log.times[log.offsets[user] : log.offsets[user + 1]]
            assert history == log.history(user)[times < end].tolist()
            assert target == log.history(user)[times >= end][0]
    for user, history in train_of(made).items():
        times = log.times[log.offsets[user] : log.offsets[user + 1]]
        assert history == log.history(user)[times < before].tolist()


def test_cold_items():
    log = random_log(200)
    made = split(log, 25, "cold_items")
    cold = np.flatnonzero(made.cold)
    assert len(cold) == 5
    assert not np.isin(np.concatenate(made.train), cold).any()
    assert np.isin(made.test.targets, cold).all()
    for user, (history, target) in triples(made.test).items():
        items = log.history(user).tolist()
        last = max(i for i, item in enumerate(items) if made.cold[item])
        assert (history, target) == ([item for item in items[:last] if not made.cold[item]], items[last])
    for part in (made.valid, made.test):  # the user had them, though no history shows them
        for user, target, unshown in zip(part.users, part.targets, part.unshown, strict=True):
            items = log.history(user)
            before = items[: np.flatnonzero(made.cold[items] == made.cold[target])[-1]]
            assert unshown.tolist() == before[made.cold[before]].tolist()
    assert any(map(len, made.valid.unshown))
    assert any(map(len, made.test.unshown))
    valid, train = triples(made.valid), train_of(made)
    for user in range(200):
        warm = [item for item in log.history(user).tolist() if not made.cold[item]]
        if len(warm) >= 2:
            assert valid[user] == (warm[:-1], warm[-1])
            assert train[user] == warm[:-1]
        else:
            assert user not in valid
            assert train.get(user, []) == warm
    other = split(log, 25, "cold_items", seed=1)
    assert not np.array_equal(other.cold, made.cold)


@pytest.mark.parametrize("name", NAMES)
def test_histories_keep_the_newest_events(name):
    long, short = split(random_log(), 25, name), split(random_log(), 25, name, max_history=3)
    for part in ("valid", "test"):
        whole, cut = triples(getattr(long, part)), triples(getattr(short, part))
        assert cut == {user: (history[-3:], target) for user, (history, target) in whole.items()}
        assert max(len(history) for history, _ in whole.values()) > 3
    assert train_of(short) == {user: history[-3:] for user, history in train_of(long).items()}


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_split_and_exact_round_trip(name, tmp_path):
    made, again = (split(random_log(), 25, name, max_users=40) for _ in range(2))
    made.save(tmp_path)
    for other in (again, Split.load(tmp_path)):
        assert other.name == name
        assert train_of(other) == train_of(made)
        np.testing.assert_array_equal(other.cold, made.cold, strict=True)
        np.testing.assert_array_equal(other.train_users, made.train_users, strict=True)
        for part in ("valid", "test"):
            assert triples(getattr(other, part)) == triples(getattr(made, part))
            assert [set(of.tolist()) for of in getattr(other, part).seen] == [
                set(of.tolist()) for of in getattr(made, part).seen
            ]
            for field in ("users", "targets"):
                a, b = (getattr(getattr(s, part), field) for s in (other, made))
                np.testing.assert_array_equal(a, b, strict=True)
        assert {h.dtype for h in [*other.train, *other.valid.histories, *other.test.histories]} == {np.dtype("int32")}
    with pytest.raises(ArtefactError, match=r"split\.npz: no split there"):
        Split.load(tmp_path / "nothing")


def test_a_sample_of_users():
    log = random_log()
    made = split(log, 25, "leave_one_out", max_users=20)
    assert len(made.train_users) == 20
    assert set(made.test.users) <= set(made.train_users)
    assert set(split(log, 25, "leave_one_out", max_users=20, seed=1).train_users) != set(made.train_users)
    whole = train_of(split(log, 25, "leave_one_out", max_users=10_000))
    assert train_of(made) == {user: whole[user] for user in made.train_users.tolist()}


def test_splits_that_cannot_be():
    with pytest.raises(ConfigError, match=r"unknown split 'random'; expected leave_one_out, temporal or cold_items"):
        split(random_log(), 25, "random")
    with pytest.raises(DataError, match=r"leave_one_out leaves no test case among 2 users: no user has the three"):
        split(log_of([[0, 1], [2]]), 3, "leave_one_out")
    with pytest.raises(ConfigError, match=r"test_share is 0\.5; .*below 0\.5"):
        split(random_log(), 25, "temporal", test_share=0.5)
    with pytest.raises(DataError, match=r"times run from 1\.0 to 1\.0, and too many are equal"):
        split(log_of([[0, 1, 2]], [[1, 1, 1]]), 3, "temporal")
    with pytest.raises(DataError, match=r"temporal leaves no test case among 10 users: no user has events on both"):
        split(log_of([[i] for i in range(10)], [[i] for i in range(10)]), 10, "temporal")
