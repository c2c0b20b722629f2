"""Settings as text: what is printed is read again, and what is wrong is named."""

import pytest

from monarchrt.models.attention.base import leaves
from monarchrt.models.attention.dense import DenseAttention
from monarchrt.models.attention.monarch import MonarchAttention
from monarchrt.models.attention.notation import from_json, parse, split_options, to_text, with_options
from monarchrt.models.attention.registry import names, register
from monarchrt.models.attention.schedule import FirstBlocks, FirstLayers, FirstSteps, PerLayer
from monarchrt.models.wan import wan_config

DENSE, TILED = DenseAttention(), MonarchAttention(tile=(3, 30, 52))
WRITTEN = {
    "dense": DENSE,
    "dense(implementation='xla')": DenseAttention(implementation="xla"),
    "monarch": MonarchAttention(),
    "monarch(tile=(3,30,52))": TILED,
    "monarch(blocks='f,hw', num_iters=2, keep_intermediates=True)": MonarchAttention(
        blocks="f,hw", num_iters=2, keep_intermediates=True
    ),
    "first_layers(2, dense, monarch(tile=(3,30,52)))": FirstLayers(layers=2, first=DENSE, after=TILED),
    "first_steps(1, dense, first_blocks(1, monarch, monarch(tile=(3,30,52))))": FirstSteps(
        steps=1, first=DENSE, after=FirstBlocks(blocks=1, first=MonarchAttention(), after=TILED)
    ),
    "per_layer(2 * dense, monarch(tile=(3,30,52)), dense)": PerLayer(settings=(DENSE, DENSE, TILED, DENSE)),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_round_trip(text):
    setting = WRITTEN[text]
    assert parse(text) == setting
    assert str(setting) == to_text(setting) == text
    assert from_json(text, where="a file") == setting
    assert hash(parse(text)) == hash(setting)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (" monarch ( tile = [3, 30, 52] ) ", "monarch(tile=(3,30,52))"),
        ("monarch()", "monarch"),
        ("monarch(implementation=xla)", "monarch(implementation='xla')"),
        ("first_layers(layers=2, first=dense, after=monarch)", "first_layers(2, dense, monarch)"),
        ("first_layers(2, after=monarch, first=dense)", "first_layers(2, dense, monarch)"),
        ("per_layer(dense, dense, 1 * monarch)", "per_layer(2 * dense, monarch)"),
        ("per_layer(settings=(dense, dense))", "per_layer(2 * dense)"),
        ("first_steps(1, top_k, svg)", "first_steps(1, top_k(keep=0.1), svg(keep=0.25))"),  # a share is always said
        ("vsa(gate=False)", "vsa(keep=0.1, gate=False)"),
        ("sla(keep=0.1)", "sla(keep=0.1)"),
        ("radial(decay=0.5)", "radial(decay=0.5)"),
    ],
)
def test_other_ways_to_write_it(text, same):
    assert str(parse(text)) == same


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; kinds: dense, monarch, "),
        ("sparse", "'sparse' is not a kind of attention; kinds: dense, monarch, "),
        ("first_layers(2, dense, monrach)", "'monrach' is not a kind of attention; kinds: dense"),
        ("3", "is not a kind of attention"),
        ("dense, monarch", "is not a kind of attention"),
        ("monarch(", "cannot be read"),
        ("monarch(tile=(3,30,52)) monarch", "cannot be read"),
        ("monarch(tiles=(3,30,52))", "monarch has no field 'tiles'; its fields: tile, blocks, num_iters"),
        ("dense(tile=(3,30,52))", "dense has no field 'tile'; its fields: implementation"),
        ("monarch((3,30,52))", "monarch takes fields by name, not 1 values"),
        ("monarch(tile=3)", r"tile=3 is not \(a whole number, a whole number, a whole number\) or None"),
        ("monarch(tile=(3,30))", r"tile=\(3, 30\) is not \(a whole number, "),
        ("monarch(num_iters=0)", "num_iters=0 is not a positive integer"),
        ("monarch(num_iters=1.5)", "num_iters=1.5 is not a whole number"),
        ("monarch(blocks=wh)", "blocks='wh' is unknown"),
        ("monarch(keep_intermediates=3)", "keep_intermediates=3 is not True or False"),
        ("monarch(num_iters=1, num_iters=2)", "cannot be given there, or is given twice|repeated"),
        ("dense(implementation=triton)", "implementation='triton'"),
        ("first_layers(2, dense)", "first_layers needs after; its fields: layers, first, after"),
        ("first_layers(2, dense, monarch, dense)", "takes layers, first, after in this order, not 4 values"),
        ("first_layers(2, dense, first=dense, after=dense)", "first is given twice"),
        ("first_layers(-1, dense, monarch)", "layers=-1 must be at least 0"),
        ("first_steps(1.5, dense, monarch)", "steps=1.5 is not a whole number"),
        ("first_blocks(True, dense, monarch)", "blocks=True is not a whole number"),
        ("first_layers(2, 3, dense)", "first=3 is not a kind of attention"),
        ("first_layers(dense, dense, dense)", "layers='dense' is not a whole number"),
        ("first_layers(2, 'dense', dense)", "first='dense' is not a kind of attention"),
        ("first_layers(2, dense, 2 * monarch)", "not 4 values"),
        ("first_layers(2, first=2 * dense, after=dense)", "stands only where a kind takes any number"),
        ("per_layer()", "there are no settings"),
        ("per_layer(0 * dense)", "is not from 1 to 1000"),
        ("per_layer(9999999999 * dense)", "is not from 1 to 1000"),
        ("per_layer(1000 * per_layer(1000 * dense))", r"stands for 1e\+06 settings; it should be at most 10000"),
        (
            "first_steps(1, dense, per_layer(9 * first_layers(1, dense, per_layer(1000 * per_layer(1000 * dense)))))",
            r"stands for 9\.\d+e\+06 settings",
        ),
        ("__import__('os').system('true')", "is not a number, a word, a tuple or a setting"),
        ("monarch(**{'tile': 1})", "cannot be given there"),
        ("monarch(tile=[x for x in 'abc'])", "is not a number, a word, a tuple or a setting"),
        ("monarch(tile=(3,30,52)[0])", "is not a number, a word, a tuple or a setting"),
        ("first_layers(2, dense, " * 30 + "dense" + ")" * 30, "nested more than 20 deep"),
        ("(" * 100_000, "cannot be read"),
        ("a" * 5000, r"attention='a{150}\.\.\.'"),
    ],
)
def test_what_is_wrong_is_named(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse(text)
    assert str(caught.value).startswith("attention=")
    assert len(str(caught.value).splitlines()) == 1


OLD = {"tile": [1, 2, 4], "blocks": "f,hw", "num_iters": 2}
KNOWN = {"tile": tuple, "blocks": str, "num_iters": int}


class TestOlderForms:
    def test_they_are_read(self):
        assert from_json(None, where="a file") == DENSE
        assert from_json(OLD, where="a file") == MonarchAttention(tile=(1, 2, 4), blocks="f,hw", num_iters=2)
        listed = from_json([None, {"tile": None, "blocks": "fh,w", "num_iters": 1}], where="a file")
        assert listed == PerLayer(settings=(DENSE, MonarchAttention()))

    @pytest.mark.parametrize("data", [3, {}, {"tile": None}, [], [3], {"kind": "monarch"}, OLD | {"more": 1}, True])
    def test_others_are_refused(self, data):
        with pytest.raises(ValueError, match=r"^a file: .*cannot be read"):
            from_json(data, where="a file")

    def test_the_file_is_named(self):
        with pytest.raises(ValueError, match="a file: attention='sparse': 'sparse' is not a kind"):
            from_json("sparse", where="a file")


class TestShortForm:
    @pytest.mark.parametrize("options", [{}, {"tile": (3, 30, 52)}, {"num_iters": 2, "blocks": "h,fw"}])
    def test_both_ways(self, options):
        text = with_options("monarch", options)
        assert split_options(text, {}, KNOWN) == ("monarch", options)
        assert split_options("monarch", options, KNOWN) == ("monarch", options)
        assert parse(text) == MonarchAttention(**options)

    def test_what_it_cannot_say_stays(self):
        for text in ("monarch(implementation='xla')", "dense", "first_layers(2, dense, monarch)", "monarch(tile=3)"):
            assert split_options(text, {}, KNOWN) == (text, {})

    def test_options_beside_it(self):
        assert split_options("monarch(num_iters=2)", {"tile": (1, 2, 3)}, KNOWN)[1] == {
            "num_iters": 2,
            "tile": (1, 2, 3),
        }
        with pytest.raises(ValueError, match=r"num_iters is 3, but attention is .*leave one of them out"):
            split_options("monarch(num_iters=2)", {"num_iters": 3}, KNOWN)
        with pytest.raises(ValueError, match="num_iters is 3 but attention is 'dense'; num_iters needs att"):
            split_options("dense", {"num_iters": 3}, KNOWN)


def test_what_is_stored_leaves_out_how():
    text = "first_layers(2, dense(implementation='xla'), per_layer(monarch(implementation='xla', num_iters=2)))"
    assert str(parse(text).stored()) == "first_layers(2, dense, per_layer(monarch(num_iters=2)))"


def test_every_row_is_a_kind_of_its_name():
    assert set(names()) >= {leaf.name for leaf in leaves(parse("first_steps(1, dense, monarch)"))}
    for name in names():
        assert from_json(name, where="").name == name if name in ("dense", "monarch") else name


def test_a_name_belongs_to_one_class():
    class Other(DenseAttention):
        name = "dense"

    with pytest.raises(ValueError, match="name='dense' is taken by DenseAttention"):
        register(Other)
    with pytest.raises(ValueError, match="name='a-b' cannot be written in the notation"):
        register(type("Odd", (DenseAttention,), {"name": "a-b"}))
    assert register(DenseAttention) is DenseAttention


class TestNetworks:
    def test_one_form_for_one_setting_per_layer(self):
        settings = (DENSE, *[MonarchAttention()] * 3)
        config = wan_config("tiny", attention=parse("per_layer(dense, 3 * monarch)"))
        assert config.attention == settings
        assert config == wan_config("tiny", attention=tuple(settings))
        assert config.layer_attention == settings == wan_config("tiny", attention=parse(SCHEDULE)).layer_attention

    def test_schedules_are_settled_by_layer(self):
        config = wan_config("tiny", attention=parse("first_steps(1, dense, first_layers(2, dense, monarch))"))
        expected = [DENSE, DENSE, *[parse("first_steps(1, dense, monarch)")] * 2]
        assert list(config.layer_attention) == expected

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("per_layer(dense, monarch)", "attention has 2 settings for num_layers=4"),
            ("first_layers(5, dense, monarch)", "layers=5 is more than num_layers=4"),
            ("first_steps(1, dense, per_layer(dense))", "attention has 1 settings for num_layers=4"),
            ("first_steps(1, dense, monarch(tile=(2,4,4)))", "causal_block=3 frames is not a multiple of the tile's 2"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, text, said):
        with pytest.raises(ValueError, match=said):
            wan_config("tiny", attention=parse(text), causal_block=3)


SCHEDULE = "first_layers(1, dense, monarch)"
