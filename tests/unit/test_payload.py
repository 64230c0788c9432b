"""Claims about data and results: what is kept, what is refused, and what the refusals say."""

from __future__ import annotations

import enum
import json
import math
import types
import typing
from collections import Counter  # noqa: TC003 - bodies' hints are resolved at run time
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgsupervisor.errors import DataInvalid, DataTooLarge, TaskDefinitionError
from bgsupervisor.mismatch import mask
from bgsupervisor.payload import NESTING_MAX, decode_data, decode_value, encode_data, encode_result
from bgsupervisor.signatures import Signature

if TYPE_CHECKING:
    import fractions

NAME = "app.tasks:Import"
LIMIT = 1024 * 1024


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: int
    y: float = 0.5


@dataclass
class Login:
    user: str
    password: str = ""

    def __post_init__(self):
        if self.user == "nobody":
            raise ValueError(f"{self.user} with {self.password} may not")
        if self.user == "quoter":
            raise ValueError(f"Expected better, got {self.password}")


class Item(msgspec.Struct, forbid_unknown_fields=True):
    sku: str
    counts: dict[str, int] = {}
    parts: list[Item] = []


class Address(TypedDict):
    town: str


class Foreign:
    pass


class SafeText(str):
    __slots__ = ()


class Half(float):
    pass


class Whole(int):
    pass


def signature(function, *, skip_self=False):
    return Signature.of(function, skip_self=skip_self, owner=NAME)


def body_with(hint):
    def body(value): ...

    body.__annotations__ = {"value": hint}
    return signature(body)


def encode(data, against=None, **options):
    return encode_data(data, signature=against, limit_bytes=LIMIT, name=NAME, **options)


def decode(text, against, **options):
    return decode_data(text, against, name=NAME, **options)


def refusal(call, *arguments, **options):
    with pytest.raises(DataInvalid) as caught:
        call(*arguments, **options)
    assert caught.value.__cause__ is None  # a traceback shows it, and it may quote a secret
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    str(caught.value).encode()
    return caught.value


# What is kept

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
json_values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=30
)


def any_keys(**anything): ...


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_what_json_can_hold_comes_back_equal(data):
    text = encode(data, signature(any_keys))
    assert decode(text, signature(any_keys)) == data
    assert decode_value(encode_result(data, limit_bytes=LIMIT)) == data
    assert json.loads(text) == data


@given(json_values)
def test_a_result_that_json_can_hold_comes_back_equal(value):
    back = decode_value(encode_result(value, limit_bytes=LIMIT))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 2**70, -(10**300), 10**4000])
def test_integers_beyond_64_bits_keep_their_value(number):
    text = encode({"value": number}, body_with(int))
    assert decode(text, body_with(int)) == {"value": number}
    assert decode(text, body_with(Any)) == {"value": number}


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int | None, None),
        (list[int], [1, 2]),
        (Point, Point(1, 2.5)),
        (Point | None, Point(1)),
        (list[Point], [Point(1), Point(2)]),
        (Color, Color.RED),
        (datetime, datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)),
        (date, date(2026, 1, 2)),
        (UUID, UUID(int=7)),
        (Decimal, Decimal("1.50")),
        (set[int], {1, 2}),
        (frozenset[str], frozenset({"a"})),
        (bytes, b"\x00\xff"),
        (Address, {"town": "Brno"}),
        (Item, Item("a", {"b": 1}, [Item("c")])),
        (Literal["a", 1], 1),
        (Annotated[int, msgspec.Meta(ge=0)], 3),
        (dict[int, str], {1: "a"}),
        (tuple[int, str], (1, "a")),
        (object, {"a": [1]}),
        (Any, [None, True]),
    ],
)
def test_the_body_gets_what_its_annotation_says(hint, value):
    against = body_with(hint)
    back = decode(encode({"value": value}, against), against)["value"]
    assert back == value
    assert type(back) is type(value)


def test_an_absent_key_is_left_to_the_default_of_the_body():
    shared = []

    def body(a: int, b: int = 5, c: list[int] = shared, *, d: str | None = None):
        return c is shared

    against = signature(body)
    kwargs = decode(encode({"a": 1}, against), against)
    assert kwargs == {"a": 1}
    assert body(**kwargs)
    assert decode('{"a": 1, "d": null}', against) == {"a": 1, "d": None}


def test_none_is_no_data():
    assert encode(None) == "{}"
    assert encode(None, signature(lambda: None)) == "{}"


def test_a_mapping_of_any_class_is_data():
    assert encode(types.MappingProxyType({"a": 1})) == '{"a":1}'


def test_subclasses_of_str_int_and_float_are_stored_as_what_they_are():
    assert encode({SafeText("a"): [SafeText("b"), Half(0.5), Whole(1)]}) == '{"a":["b",0.5,1]}'


def test_a_result_of_none_is_null_and_no_text_is_none():
    assert encode_result(None, limit_bytes=4) == "null"
    assert decode_value("null") is None
    assert decode_value(None) is None


def test_extra_keys_go_to_a_body_that_takes_them():
    def body(self, a: int, **rest): ...

    against = signature(body, skip_self=True)
    assert decode(encode({"a": 1, "b": "x"}, against), against) == {"a": 1, "b": "x"}
    error = refusal(encode, {"a": 1, "self": 2}, against)
    assert error.field == "$.self"


def test_a_parameter_may_have_any_name():
    def body(*, __hidden, keys, __class__, cls, self, p0, café): ...  # noqa: PLC2401

    data = {"__hidden": 1, "keys": 2, "__class__": 3, "cls": 4, "self": 5, "p0": 6, "café": 7}
    against = signature(body)
    assert decode(encode(data, against), against) == data


def test_a_local_type_that_the_body_uses_is_found():
    @dataclass
    class Local:
        a: int

    def body(value: Local):
        return Local

    assert decode('{"value": {"a": 1}}', signature(body)) == {"value": Local(1)}


def test_the_return_annotation_does_not_matter():
    def body(a: int) -> fractions.Fraction: ...

    assert decode('{"a": 1}', signature(body)) == {"a": 1}


def test_a_wrapped_body_is_read_in_its_own_module():
    wrapped = types.FunctionType((lambda: None).__code__, {})
    wrapped.__wrapped__ = at_point
    assert decode('{"point": {"x": 1}}', signature(wrapped)) == {"point": Point(1)}


def at_point(point: Point): ...


# Bodies that cannot work


def positional_only(a, /): ...
def star_args(a, *rest): ...
def unresolvable(a: fractions.Fraction): ...
def custom(a: Foreign): ...
def custom_inside(a: dict[str, list[Foreign]]): ...
def custom_in_union(a: int | Foreign): ...
def two_mappings(a: Point | Item): ...
def a_path(a: Path): ...
def a_counter(a: Counter[str]): ...
def a_call(a: typing.Callable[[int], int]): ...


@pytest.mark.parametrize(
    ("body", "facts"),
    [
        (positional_only, ["'a'", "by position"]),
        (star_args, ["'*rest'", "by position"]),
        (unresolvable, ["'a'", "fractions.Fraction", "'fractions' is not defined", "TYPE_CHECKING"]),
        (custom, ["'a'", "Foreign", "no JSON type"]),
        (custom_inside, ["'a'", "dict[str, list[", "Foreign"]),
        (custom_in_union, ["'a'", "int |", "Foreign"]),
        (two_mappings, ["'a'", "Point", "Item", "more than one dict-like"]),
        (a_path, ["'a'", "Path"]),
        (a_counter, ["'a'", "Counter"]),
        (a_call, ["'a'", "Callable"]),
    ],
)
def test_a_body_that_data_cannot_fill_is_a_definition_error(body, facts):
    with pytest.raises(TaskDefinitionError) as caught:
        signature(body)
    for fact in [NAME, f"{body.__name__}()", *facts]:
        assert fact in str(caught.value)


def test_a_custom_type_inside_a_dataclass_is_found():
    holder = dataclass(type("Holder", (), {"__annotations__": {"it": Foreign}}))
    with pytest.raises(TaskDefinitionError, match="Foreign is no JSON type"):
        body_with(holder)


def no_self(): ...
def starred_self(*args): ...
def keyword_self(*, a): ...


@pytest.mark.parametrize("body", [no_self, starred_self, keyword_self])
def test_a_method_without_self_is_a_definition_error(body):
    with pytest.raises(TaskDefinitionError, match="write self as the first"):
        signature(body, skip_self=True)


def test_self_is_not_data():
    def run(self, /, a: int): ...

    against = signature(run, skip_self=True)
    assert decode('{"a": 1}', against) == {"a": 1}
    assert refusal(encode, {"a": 1, "self": 1}, against).field == "$.self"


# Data that is not JSON


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        ([1], ["mapping", "list"]),
        ("{}", ["mapping", "str"]),
        ({1: 2}, ["str keys", "int 1"]),
    ],
)
def test_data_is_a_mapping_with_str_keys(data, facts):
    error = refusal(encode, data)
    assert error.field == "$"
    for fact in [NAME, *facts]:
        assert fact in str(error)


@pytest.mark.parametrize(
    ("data", "path", "fact"),
    [
        ({"a": object()}, "$.a", "a object"),
        ({"a": [0, {"b": lambda: 0}]}, "$.a[1].b", "a function"),
        ({"a": Point(1, object())}, "$.a.y", "a object"),
        ({"a": Item("x", {"k": 1j})}, "$.a.counts.k", "a complex"),
        ({"a": {"x y": Path()}}, "$.a['x y']", "Path"),
        ({"a": {(1, 2): 3}}, "$.a", "key that is neither text nor a number"),
        ({"a": types.MappingProxyType({})}, "$.a", "a mappingproxy"),
        ({"a": enum.Enum("Odd", {"A": object()}).A}, "$.a", "a object"),
        ({"a": 10**5000}, "$", "4300 digits"),
    ],
)
def test_what_json_cannot_hold_is_named_with_its_path_and_type(data, path, fact):
    error = refusal(encode, data)
    assert error.field == path
    assert f"{path} " in str(error)
    assert fact in str(error)
    assert NAME in str(error)


def test_an_open_file_is_refused():
    with Path(__file__).open() as file:
        error = refusal(encode, {"file": file})
    assert error.field == "$.file"
    assert "TextIOWrapper" in str(error)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda number: {"a": number}, "$.a"),
        (lambda number: {"a": [1.0, {"b": (number,)}]}, "$.a[1].b[0]"),
        (lambda number: {"a": Point(1, number)}, "$.a.y"),
        (lambda number: {"a": {number}}, "$.a[0]"),
        (lambda number: {"a": Half(number)}, "$.a"),
    ],
)
def test_nan_and_infinity_are_refused_wherever_they_are(wrap, path, number):
    error = refusal(encode, wrap(number))
    assert error.field == path
    assert str(number) in str(error)


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"a": "x\ud800"}, "$.a"),
        ({"a": [{"b": "\udfff"}]}, "$.a[0].b"),
        ({"a": {"\ud800": 1}}, "$.a['\\ud800']"),
        ({"\ud800": {}}, "$['\\ud800']"),
    ],
)
def test_a_lone_surrogate_is_refused_with_its_path(data, path):
    error = refusal(encode, data)
    assert error.field == path
    assert "lone surrogate" in str(error)


def nested(levels):
    value = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [NESTING_MAX, 900, 100_000])
def test_deep_nesting_is_refused_with_its_field(levels):
    error = refusal(encode, {"b": 1, "a": nested(levels)})
    assert error.field == "$.a"
    assert f"deeper than {NESTING_MAX}" in str(error)


def test_the_deepest_allowed_nesting_comes_back():
    data = {"value": nested(NESTING_MAX - 1)}
    assert decode(encode(data, body_with(Any)), body_with(Any)) == data


def test_data_that_refers_to_itself_is_refused():
    cycle = {}
    cycle["a"] = [cycle]
    error = refusal(encode, cycle)
    assert error.field == "$.a"
    assert "refers to itself" in str(error)


def test_data_may_take_the_limit_and_not_a_byte_more():
    data = {"a": "é" * 10}
    size = len('{"a":""}') + 20
    encode_data(data, signature=None, limit_bytes=size, name=NAME)
    with pytest.raises(DataTooLarge) as caught:
        encode_data(data, signature=None, limit_bytes=size - 1, name=NAME)
    assert (caught.value.size_bytes, caught.value.limit_bytes) == (size, size - 1)
    for fact in [NAME, "28 bytes", "27", "data_max_bytes"]:
        assert fact in str(caught.value)


# Data that does not fit the body


def invoices(
    *,
    ids: list[int],
    color: Color = Color.RED,
    mode: Literal["fast", "slow"] = "fast",
    item: Item | None = None,
    counts: dict[str, list[int]] | None = None,
    by_id: dict[int, str] | None = None,
    when: datetime | None = None,
    token: UUID | None = None,
    size: Annotated[int, msgspec.Meta(ge=0)] = 0,
    login: Login | None = None,
): ...


MISFITS = [
    ({"ids": [1, "a"]}, "$.ids[1]", ["must be int", "str 'a' came", "(ids: list[int])"]),
    ({"ids": None}, "$.ids", ["must be list", "None came"]),
    ({"ids": [True]}, "$.ids[0]", ["must be int", "bool True came"]),
    ({"ids": [1.0]}, "$.ids[0]", ["must be int", "float 1.0 came"]),
    ({"ids": "x" * 500}, "$.ids", ["must be list", "str 'xxx", "xxx... came"]),
    ({}, "$.ids", ["is missing", "(ids: list[int])"]),
    ({"ids": [], "colour": 1}, "$.colour", ["did you mean 'color'", "ids, color, mode"]),
    ({"ids": [], "zzz": 1}, "$.zzz", ["not a parameter", "ids, color, mode"]),
    ({"ids": [], "color": "green"}, "$.color", ["one of 'red', 'blue'", "str 'green' came"]),
    ({"ids": [], "mode": "idle"}, "$.mode", ["one of 'fast', 'slow'", "str 'idle' came"]),
    ({"ids": [], "item": 3}, "$.item", ["must be dict | None", "int 3 came"]),
    ({"ids": [], "item": {}}, "$.item.sku", ["is missing", "(item: "]),
    ({"ids": [], "item": {"sku": "a", "skv": 1}}, "$.item.skv", ["not a known field"]),
    (
        {"ids": [], "item": {"sku": "a", "counts": {"a": 1, "b b": "x", "c": "y"}}},
        "$.item.counts['b b']",
        ["must be int", "str 'x' came"],
    ),
    ({"ids": [], "counts": {"a": [1], "b": [2, "z"]}}, "$.counts.b[1]", ["must be int", "str 'z' came"]),
    ({"ids": [], "by_id": {"1": "a", "x": "b"}}, "$.by_id.x", ["have a key that is int", "str 'x' came"]),
    ({"ids": [], "when": "soon"}, "$.when", ["valid RFC3339 encoded datetime", "str 'soon' came"]),
    ({"ids": [], "token": "t"}, "$.token", ["valid UUID", "str 't' came"]),
    ({"ids": [], "size": -1}, "$.size", ["must be int >= 0", "int -1 came"]),
    ({"ids": [], "login": {"user": "nobody"}}, "$.login", ["nobody with  may not", "Login", "dict {'user': 'nobody'}"]),
]


@pytest.mark.parametrize(("data", "path", "facts"), MISFITS)
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_a_misfit_names_the_task_the_field_what_was_expected_and_what_came(way, data, path, facts):
    against = signature(invoices)
    error = refusal(encode, data, against) if way == "encode" else refusal(decode, json.dumps(data), against)
    assert error.field == path
    assert len(str(error)) < 400
    for fact in [NAME, f"{path} ", *facts]:
        assert fact in str(error)


def test_what_came_is_named_by_the_type_that_was_passed():
    error = refusal(encode, {"ids": [Decimal("1.5")]}, signature(invoices))
    assert "must be int, but Decimal '1.5' came" in str(error)


def test_the_key_at_fault_is_found_among_many():
    counts = {f"k{number}": [number] for number in range(20_000)} | {"k15000": ["x"]}
    assert refusal(encode, {"ids": [], "counts": counts}, signature(invoices)).field == "$.counts.k15000[0]"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("{'ids': []}", "not JSON"),
        ('{"ids": [NaN]}', "not JSON"),
        ('{"ids": [1e400]}', "out of range"),
        ('{"ids": [' + "1" * 5000 + "]}", "out of range"),
        ('{"ids": "\ud800"}', "lone surrogate"),
        ('{"ids": "\\ud800"}', "not JSON"),
        ("[1]", "must be dict, but list [1] came"),
        ("null", "must be dict, but None came"),
        ('"x"', "must be dict, but str 'x' came"),
        (None, "not JSON"),
        (7, "not JSON"),
    ],
)
@pytest.mark.parametrize("body", [invoices, any_keys])
def test_a_row_of_nonsense_is_refused(text, fact, body):
    error = refusal(decode, text, signature(body))
    assert NAME in str(error)
    assert fact in str(error)


@pytest.mark.parametrize("body", [any_keys, lambda rest: None])  # noqa: ARG005 - only its name counts
def test_a_row_nested_beyond_the_recursion_limit_is_refused(body):
    error = refusal(decode, '{"rest": ' + "[" * 100_000 + "]" * 100_000 + "}", signature(body))
    assert "nested deeper" in str(error)


def test_a_value_nested_beyond_the_recursion_limit_is_refused():
    assert "nested deeper" in str(refusal(decode_value, "[" * 100_000 + "]" * 100_000))


def test_a_result_that_is_nonsense_is_refused():
    assert "stored value" in str(refusal(decode_value, "{"))


# Results


@pytest.mark.parametrize(
    ("value", "path", "fact"),
    [
        (math.nan, "$", "nan"),
        ("\ud800", "$", "lone surrogate"),
        (object(), "$", "object"),
        ([1, {"a": math.inf}], "$[1].a", "inf"),
        ({1: object()}, "$[1]", "object"),
        (nested(NESTING_MAX + 1), "$[0]", "deeper"),
    ],
)
def test_a_result_that_json_cannot_hold_is_told_as_the_result(value, path, fact):
    error = refusal(encode_result, value, limit_bytes=LIMIT)
    assert error.field == path
    assert str(error).startswith("the result is invalid: ")
    assert fact in str(error)


def test_a_result_beyond_the_limit_is_told_as_the_result():
    with pytest.raises(DataTooLarge, match="the result is too large: 12 bytes, but data_max_bytes allows 11"):
        encode_result("a" * 10, limit_bytes=11)


# Secrets

SECRET = "hunter2"


def login_body(
    *,
    user: str = "",
    password: UUID | None = None,
    color: Color | None = None,
    pairs: dict[str, int] | None = None,
    login: Login | None = None,
    logins: list[int] | None = None,
    mode: Literal["fast"] = "fast",
): ...


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"password": SECRET}, "$.password"),
        ({"password": {SECRET: SECRET}}, "$.password"),
        ({"password": [SECRET]}, "$.password"),
        ({"color": SECRET}, "$.color"),
        ({"mode": SECRET}, "$.mode"),
        ({"pairs": {SECRET: SECRET}}, "$.pairs"),
        ({"user": {"password": SECRET}}, "$.user"),
        ({"logins": [{"password": SECRET}]}, "$.logins[0]"),
        ({"login": {"user": "nobody", "password": SECRET}}, "$.login"),
        ({"login": {"user": "quoter", "password": SECRET}}, "$.login"),
        ({"login": {"password": SECRET}}, "$.login.user"),
        ({"login": Login("a", {SECRET: SECRET})}, "$.login.password"),
        ({"pairs": {SECRET: math.nan}}, "$.pairs"),
        ({"pairs": {SECRET: object()}}, "$.pairs"),
        ({"password": SECRET + "\ud800"}, "$.password"),
        ({"password": {SECRET + "\ud800": 1}}, "$.password"),
        ({"password": SECRET, "passwort": SECRET}, "$"),
        ([SECRET], "$"),
    ],
)
def test_no_message_shows_a_secret(data, path):
    secret = ("password", "color", "pairs", "mode")
    against = signature(login_body)
    error = refusal(encode, data, against, secret=secret)
    assert error.field.startswith(path)
    for text in [str(error), repr(error), error.field]:
        assert SECRET not in text
    try:
        written = json.dumps(data)
    except (TypeError, ValueError):
        return
    assert SECRET not in str(refusal(decode, written, against, secret=secret))


def test_the_type_and_the_hint_of_a_secret_are_told():
    error = refusal(encode, {"password": SECRET}, signature(login_body), secret=("password",))
    assert "must be uuid.UUID | None, but str *** came" in str(error)


def test_masking_reaches_every_depth_and_leaves_its_argument_alone():
    data = {"password": {"a": 1}, "list": [{"password": 1, "b": ({"password": 2},)}], "c": "d"}
    before = json.dumps(data)
    assert mask(data, {"password"}) == {
        "password": "***",
        "list": [{"password": "***", "b": [{"password": "***"}]}],
        "c": "d",
    }
    assert json.dumps(data) == before
