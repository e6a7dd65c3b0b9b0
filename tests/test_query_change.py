"""How messages change a query: each case written by hand, and what holds after any change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.mentions import Mention
from genrec.query import MAX_COUNT, Fact, Query
from genrec.query_change import apply_change
from genrec.query_schema import Change, roles_of
from tests.export_fixture import make_catalogue

CATALOGUE = make_catalogue(30, np.random.default_rng(3))
RED, BLUE, LAMP = (
    Fact(name="colour", value="red"),
    Fact(name="colour", value="blue"),
    Fact(name="category", value="lamp"),
)
PRICED = [item for item, price in zip(CATALOGUE.item_ids, CATALOGUE.prices, strict=True) if price == price]
PRICES = {item: round(float(CATALOGUE.prices[CATALOGUE.index[item]]), 2) for item in PRICED}
SHOWN = tuple(PRICED[:3])


def value(fact: Fact) -> Mention:
    return Mention(0, 0, "value" if fact.value else "attribute", fact=fact)


def number(n: float) -> Mention:
    return Mention(0, 0, "number", number=n)


def item(*ids: str) -> Mention:
    return Mention(0, 0, "item", items=ids)


def after(query: Query, *roles: tuple[Mention, str], whole: str = "keep", shown: tuple[str, ...] = SHOWN) -> Query:
    return apply_change(query, Change(list(roles), whole), CATALOGUE, shown)  # type: ignore[arg-type]


def test_the_later_wish_takes_the_place_of_the_earlier() -> None:
    query = after(Query(wanted=[RED, LAMP]), (value(BLUE), "want"))
    assert query.wanted == [LAMP, BLUE]
    assert after(query, (value(RED), "also")).wanted == [LAMP, BLUE, RED]
    assert after(Query(), (value(RED), "want"), (value(BLUE), "want")).wanted == [RED, BLUE]
    assert after(Query(wanted=[RED]), (value(RED), "want")).wanted == [RED]


def test_wanted_and_unwanted_end_each_other() -> None:
    assert after(Query(wanted=[RED]), (value(RED), "avoid")) == Query(unwanted=[RED])
    assert after(Query(unwanted=[RED]), (value(RED), "want")) == Query(wanted=[RED])
    assert after(Query(unwanted=[RED]), (value(RED), "also")) == Query(wanted=[RED])
    assert after(Query(unwanted=[RED]), (value(BLUE), "want")) == Query(wanted=[BLUE], unwanted=[RED])


def test_dropping_a_value_or_an_attribute() -> None:
    held = Query(wanted=[RED, LAMP], unwanted=[BLUE])
    assert after(held, (value(RED), "drop")) == Query(wanted=[LAMP], unwanted=[BLUE])
    assert after(held, (value(Fact(name="colour", value="")), "drop")) == Query(wanted=[LAMP])
    assert after(held, (value(Fact(name="size", value="")), "drop")) == held


def test_prices() -> None:
    assert after(Query(), (number(30), "max"), (number(10), "min")) == Query(price_min=10, price_max=30)
    assert after(Query(), (number(30), "min"), (number(10), "max")) == Query(price_min=10, price_max=30)
    assert after(Query(price_min=50), (number(30), "max")) == Query(price_max=30)  # the later bound wins
    assert after(Query(price_max=20), (number(30), "min")) == Query(price_min=30)
    assert after(Query(price_min=1, price_max=2), whole="any price") == Query()


def test_cheaper_and_dearer_than_what() -> None:
    prices = [PRICES[i] for i in SHOWN]
    cheaper = after(Query(price_min=0.5), whole="cheaper")
    assert cheaper.price_max == pytest.approx(min(prices) - 0.01)
    assert after(Query(), whole="dearer").price_min == pytest.approx(max(prices) + 0.01)
    one = after(Query(), (item(SHOWN[1]), "cheaper"))
    assert one.price_max == pytest.approx(prices[1] - 0.01)
    assert not any(one.allowed(CATALOGUE)[[CATALOGUE.index[SHOWN[1]]]])
    assert after(Query(), (item(SHOWN[1]), "dearer")).price_min == pytest.approx(prices[1] + 0.01)
    unpriced = tuple(i for i in CATALOGUE.item_ids if i not in PRICES)
    assert unpriced
    assert after(Query(), whole="cheaper", shown=unpriced) == Query()
    assert after(Query(), whole="cheaper", shown=()) == Query()
    assert after(Query(), whole="cheaper", shown=("gone",)) == Query()


def test_items_and_counts() -> None:
    query = after(Query(disliked=["item-1"]), (item("item-1"), "like"), (item("item-2", "item-3"), "dislike"))
    assert query == Query(liked=["item-1"], disliked=["item-2", "item-3"])
    assert after(Query(), (number(5), "count")).count == 5
    assert after(Query(), (number(500), "count")).count == MAX_COUNT


def test_none_changes_nothing_and_starting_over_everything() -> None:
    held = Query(wanted=[RED], price_max=3, liked=["item-1"], count=7)
    assert after(held, (value(BLUE), "none"), (number(3), "none"), (item("item-5"), "none")) == held
    assert after(held, whole="start over") == Query()
    assert after(held, (value(BLUE), "want"), whole="start over") == Query(wanted=[BLUE])


MENTIONS = st.one_of(
    st.sampled_from([RED, BLUE, LAMP, Fact(name="colour", value="")]).map(value),
    st.floats(0, 1e9).map(number),
    st.sampled_from(CATALOGUE.item_ids).map(item),
)
ROLES = MENTIONS.flatmap(lambda mention: st.tuples(st.just(mention), st.sampled_from(roles_of(mention))))
WHOLES = st.sampled_from(["keep", "cheaper", "dearer", "any price", "start over"])


@given(st.lists(st.tuples(st.lists(ROLES, max_size=6), WHOLES), max_size=6))
def test_any_conversation_leaves_a_query_that_does_not_contradict_itself(said: list) -> None:
    query = Query()
    for roles, whole in said:
        query = after(query, *roles, whole=whole)
        assert not set(query.wanted) & set(query.unwanted)
        assert not set(query.liked) & set(query.disliked)
        assert len(set(query.wanted)) == len(query.wanted)
        assert query.price_min is None or query.price_max is None or query.price_min <= query.price_max
        assert all(fact.value for fact in (*query.wanted, *query.unwanted))
        Query.model_validate(query.model_dump())
