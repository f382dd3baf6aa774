"""serialize: round trips through JSON, and errors that name the field, the value and what would be right."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from deepseek_jax.serialize import check_types, from_dict, to_dict


@dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square:
    side: int | None
    colour: Literal["red", "blue"] = "red"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    name: str
    shape: Circle | Square
    frame: "None | Circle" = None  # a string annotation, and a union with one dataclass
    layers: tuple[Circle | Square, ...] = ()
    extent: tuple[int, float] = (1, 2.0)
    weights: dict[str, float] = field(default_factory=dict)
    folder: Path = Path("out")
    notes: list[str] = field(default_factory=list)
    visible: bool = True
    extra: Any = None


@dataclass(frozen=True, kw_only=True)
class Album:
    best: Drawing
    rest: tuple[Drawing, ...] = ()


DRAWING = Drawing(
    name="a",
    shape=Square(side=None, colour="blue"),
    frame=Circle(radius=1),
    layers=(Circle(radius=0.5), Square(side=2)),
    weights={"x": 0.25},
    notes=["n"],
    extra={"free": [1, "form"]},
)
ALBUM = Album(best=DRAWING, rest=(DRAWING, Drawing(name="b", shape=Circle(radius=2.0))))


def test_round_trip_through_json():
    assert from_dict(Album, json.loads(json.dumps(to_dict(ALBUM)))) == ALBUM


def test_members_of_unions_and_containers_carry_their_kind():
    values = to_dict(ALBUM)
    assert "type" not in values and "type" not in values["best"]
    assert values["best"]["shape"] == {"type": "Square", "side": None, "colour": "blue"}
    assert values["best"]["frame"]["type"] == "Circle"
    assert [layer["type"] for layer in values["best"]["layers"]] == ["Circle", "Square"]


def test_values_come_back_in_their_own_types():
    back = from_dict(Drawing, {"name": "a", "shape": {"type": "Circle", "radius": 3}, "folder": "x", "extent": [1, 2]})
    assert type(back.shape.radius) is float
    assert back.folder == Path("x")
    assert back.extent == (1, 2.0)
    assert back.visible is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "a"}, r"Drawing has no field 'nmae' \(Drawing\): did you mean 'name'\?"),
        ({"zzz": 1}, r"no field 'zzz' \(Drawing\): the fields are name, shape, frame"),
        ({"name": 3}, r"Drawing\.name = 3 \(int\): must be str"),
        ({"visible": 1}, r"Drawing\.visible = 1 \(int\): must be bool"),
        ({"shape": {"type": "Circle", "radius": True}}, r"shape\.radius = True \(bool\): must be float"),
        ({"shape": {"type": "Circle", "radius": "1"}}, r"shape\.radius = '1' \(str\): must be float"),
        (
            {"shape": {"type": "Circle", "radus": 1.0}},
            r"shape has no field 'radus' \(Circle\): did you mean 'radius'\?",
        ),
        ({"shape": {"type": "Circle"}}, r"shape\.radius is missing: must be float"),
        ({"shape": {"type": "Square", "side": 1.5}}, r"shape\.side = 1\.5 \(float\): must be int \| None"),
        ({"shape": {"type": "Square", "side": 1, "colour": "pink"}}, r"colour = 'pink' .*one of 'red', 'blue'"),
        ({"shape": {"type": "Disc", "radius": 1.0}}, r"shape\.type = 'Disc' \(str\): must be 'Circle' or 'Square'"),
        ({"shape": {"radius": 1.0}}, r"shape\.type = None .*must be 'Circle' or 'Square'"),
        ({"shape": 7}, r"shape = 7 \(int\): must be Circle \| Square"),
        ({"layers": [{"type": "Circle", "radius": None}]}, r"layers\[0\]\.radius = None"),
        ({"extent": [1]}, r"extent = \[1\] \(list\): must be tuple\[int, float\], 2 items"),
        ({"extent": 5}, r"extent = 5 \(int\): must be tuple\[int, float\]"),
        ({"weights": {"x": "heavy"}}, r"weights\['x'\] = 'heavy' \(str\): must be float"),
        ({"type": "Drawing"}, r"Drawing\.type = 'Drawing' \(str\): must be absent"),
    ],
)
def test_from_dict_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Drawing, to_dict(DRAWING) | change)


def test_from_dict_names_the_outer_path():
    values = to_dict(ALBUM)
    values["rest"][1]["shape"]["radius"] = "big"
    with pytest.raises(ValueError, match=r"Album\.rest\[1\]\.shape\.radius = 'big' \(str\): must be float"):
        from_dict(Album, values)


def test_missing_field_without_default():
    with pytest.raises(ValueError, match=r"Drawing\.name is missing: must be str"):
        from_dict(Drawing, {"shape": {"type": "Circle", "radius": 1.0}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, r"Drawing\.name = None \(NoneType\): must be str"),
        ({"visible": 1}, r"visible = 1 \(int\): must be bool"),
        ({"shape": Circle(radius=True)}, r"shape\.radius = True \(bool\): must be float"),
        ({"shape": Square(side="1")}, r"shape\.side = '1' \(str\): must be int \| None"),
        ({"shape": Square(side=1, colour="pink")}, r"shape\.colour = 'pink' \(str\): must be one of 'red', 'blue'"),
        ({"shape": DRAWING}, r"shape = Drawing\(.*must be Circle \| Square"),
        ({"frame": Square(side=1)}, r"frame = Square\(.*must be None \| Circle"),
        ({"layers": [Circle(radius=1.0)]}, r"layers = \[.*\(list\): must be tuple"),
        ({"layers": (Circle(radius="1"),)}, r"layers\[0\]\.radius = '1'"),
        ({"extent": (1.0, 2.0)}, r"extent\[0\] = 1\.0 \(float\): must be int"),
        ({"weights": {1: 1.0}}, r"weights = \{1: 1\.0\} \(dict\): must be dict\[str, float\]"),
        ({"folder": "out"}, r"folder = 'out' \(str\): must be Path"),
    ],
)
def test_check_types_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        check_types(replace(DRAWING, **change))


def test_check_types_accepts_an_int_for_a_float():
    check_types(ALBUM)
    check_types(Circle(radius=3))


def test_check_types_wants_a_dataclass():
    with pytest.raises(ValueError, match="expected a dataclass instance"):
        check_types({"name": "a"})


def test_annotations_that_cannot_be_handled_are_named():
    @dataclass(frozen=True)
    class Odd:
        callback: "set[int]"

    with pytest.raises(TypeError, match=r"Odd\.callback is annotated set\[int\]"):
        check_types(Odd(callback={1}))


def test_every_member_of_the_family_round_trips():
    from deepseek_jax import ModelConfig, get_config, list_configs

    for name in list_configs():
        config = get_config(name)
        check_types(config)
        assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config, name
