"""The form of requests and answers: models, validation, the OpenAPI document."""

import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema

from transaksi.app import MAX_NOMINAL, MAX_SALDO, REFUSALS, JenisTransaksi, Refusal

M = TypeVar("M", bound=BaseModel)

KEY = "^[ -~]{1,255}$"
MEANINGS = {
    400: "Malformed, or against the rules: nothing has changed",
    401: "Not authenticated, whatever the cause",
    408: "The payload did not come in time",
    413: "The payload is over 4 KiB",
    415: "The payload is not declared as JSON",
    422: "The key was used for another path or payload",
    503: "With Retry-After: not carried out, try again. Without: outcome unknown, repeat with the same key",
}


class MovementRequest(BaseModel):
    """A deposit or a withdrawal of `nominal` whole rupiah."""

    model_config = ConfigDict(strict=True)
    no_rekening: str = Field(pattern="^[0-9]{10,16}$", examples=["1234567890"])
    nominal: int = Field(ge=1, le=MAX_NOMINAL, examples=[50000])


def digits(text: str) -> str:
    if not re.fullmatch("[0-9]{1,18}", text):  # int() takes " +1_0", too
        raise ValueError
    return text


class StatementRequest(BaseModel):
    """A page: at most `batas` movements with ids below `sebelum`, without it the newest."""

    sebelum: Annotated[int, Field(ge=1), BeforeValidator(digits)] | SkipJsonSchema[None] = None
    batas: Annotated[int, BeforeValidator(digits)] = Field(20, ge=1, le=100)


class Balance(BaseModel):
    """The balance in whole rupiah; after a movement, the balance right after it."""

    saldo: int = Field(ge=0, le=MAX_SALDO, examples=[1050000])


class BookedMovement(BaseModel, from_attributes=True):
    """A movement in the mutation book: whole rupiah, UTC."""

    id_transaksi: int = Field(examples=[17])
    tanggal_transaksi: datetime
    jenis_transaksi: JenisTransaksi
    nominal: int = Field(examples=[50000])
    saldo_akhir: int = Field(examples=[1050000])


class Statement(BaseModel):
    """A page of the mutation book, newest first. `sebelum` asks for the next page; null on the last."""

    mutasi: list[BookedMovement]
    sebelum: int | None


class Error(BaseModel):
    """Why a request was refused, in words for the customer."""

    remark: str = Field(examples=["Saldo tidak mencukupi."])


def validate(parse: Callable[[Any], M], data: Any) -> M:
    """`parse(data)`. Raises `Refusal` that names the first wrong field."""
    try:
        return parse(data)
    except ValidationError as error:
        fields = (part for problem in error.errors(include_input=False) for part in problem["loc"])
        raise Refusal(next((str(field) for field in fields if field in REFUSALS), "not_json")) from None


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for the OpenAPI document."""
    return {status: {"model": Error, "description": MEANINGS[status]} for status in statuses}


def parameter(name: str, where: str, schema: Any, description: str = "") -> dict[str, Any]:
    return {"name": name, "in": where, "schema": schema, "description": description}


KEY_MEANING = "The same key again gets the first answer, with Idempotent-Replayed: true"
MOVEMENT_DOCUMENT = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": MovementRequest.model_json_schema()}},
    },
    "parameters": [parameter("Idempotency-Key", "header", {"type": "string", "pattern": KEY}, KEY_MEANING)],
}
STATEMENT_DOCUMENT = {
    "parameters": [
        parameter(name, "query", schema)
        for name, schema in StatementRequest.model_json_schema()["properties"].items()
    ]
}
