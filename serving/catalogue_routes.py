"""Routes that read: items with pictures, categories, users and their histories; the page at / lives on them."""

from __future__ import annotations

import math
import time
from typing import Annotated

import anyio
from fastapi import FastAPI, HTTPException, Path, Query, Request, Response, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from genrec.catalog import Catalogue
from genrec.serving.bodies import MAX_HISTORY, ItemId, Problem
from genrec.serving.desk import Desk
from genrec.serving.resolve import item_rows
from genrec.serving.thumbnails import Thumbnails, image_path

DECODERS = 2  # pictures decoded at once: a large one takes 120 MB while it is
CATEGORIES = 500  # most that are listed
PATIENCE_S = 60.0  # beyond the store's own limit, which says better what is wrong
Name = Annotated[str, Path(min_length=1, max_length=256)]


class ItemsWish(BaseModel):
    """Query of GET /v1/items."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field("", max_length=200, description="words of title, categories or id")
    category: str | None = Field(None, max_length=256)
    item_id: list[ItemId] = Field([], max_length=MAX_HISTORY, description="these items, in this order, and no search")
    limit: int = Field(20, ge=1, le=100)


class UsersWish(BaseModel):
    """Query of GET /v1/users."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)


class Item(BaseModel):
    """What a shop shows of an item."""

    item_id: str
    title: str
    categories: list[str]
    price: float | None = Field(description="null where unknown")
    available: bool = Field(description="false: no list holds it")
    image: str | None = Field(description="path of its picture on this server, null where there is none")


class Items(BaseModel):
    """Answer of GET /v1/items and of a user's history."""

    items: list[Item]


class Category(BaseModel):
    """A category and how many items are in it."""

    name: str
    items: int


class Categories(BaseModel):
    """Answer of GET /v1/categories, the largest first."""

    categories: list[Category]


class Users(BaseModel):
    """Answer of GET /v1/users."""

    users: list[str]


def add_catalogue(app: FastAPI, desk: Desk) -> None:
    """Add the routes that read the catalogue and the store."""
    thumbnails, decoders = Thumbnails(), anyio.CapacityLimiter(DECODERS)
    key = [Security(HTTPBearer(auto_error=False))]

    def shown(catalogue: Catalogue, row: int) -> Item:
        price = float(catalogue.prices[row])
        return Item(
            item_id=catalogue.item_ids[row],
            title=catalogue.titles[row],
            categories=catalogue.categories[row],
            price=None if math.isnan(price) else round(price, 2),
            available=bool(catalogue.available[row]) and row not in desk.switches.denied,
            image=image_path(catalogue, row),
        )

    @app.get("/v1/items", dependencies=key)
    async def items(wish: Annotated[ItemsWish, Query()]) -> Items:
        """Items by words and category, the most popular first, or by their ids."""
        state = desk.now
        if wish.item_id:
            rows = item_rows(state.export.catalogue, wish.item_id)
        else:
            rows = await run_in_threadpool(state.search.find, wish.query, wish.category, wish.limit)
        return Items(items=[shown(state.export.catalogue, row) for row in rows])

    @app.get(
        "/v1/items/{item_id:path}/image",
        dependencies=key,
        response_class=Response,
        responses={
            200: {"content": {"image/jpeg": {}}},
            404: {"model": Problem, "description": "no such item, or none with a picture"},
        },
    )
    async def image(item_id: Name) -> Response:
        """An item's picture, small."""
        catalogue = desk.now.export.catalogue
        path = None if item_id not in catalogue.index else catalogue.images[catalogue.index[item_id]]
        found = None if path is None else await anyio.to_thread.run_sync(thumbnails.jpeg, path, limiter=decoders)
        if found is None:
            raise HTTPException(404, "this export has no picture of an item of this id; GET /v1/items lists items")
        return Response(found, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    @app.get("/v1/categories", dependencies=key)
    async def categories() -> Categories:
        """The catalogue's categories."""
        largest = desk.now.categories[:CATEGORIES]
        return Categories(categories=[Category(name=name, items=items) for name, items in largest])

    @app.get("/v1/users", dependencies=key)
    async def users(http: Request, wish: Annotated[UsersWish, Query()]) -> Users:
        """Users of the caller's tenant that have stored events, in the order of their ids."""
        tenant = http.state.caller.tenant
        return Users(users=await desk.stored(lambda store: store.users(tenant, wish.limit)))

    @app.get("/v1/users/{user_id:path}/history", dependencies=key)
    async def history(user_id: Name, http: Request) -> Items:
        """A user's newest stored events, oldest first; those whose item this export does not know are left out."""
        found = await desk.history(http, user_id, [], time.monotonic() + PATIENCE_S)
        catalogue = desk.now.export.catalogue
        return Items(items=[shown(catalogue, row) for row in item_rows(catalogue, found)])
