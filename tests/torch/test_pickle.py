import pickle
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgrad.torch as jgt
from jaxgrad._disk.malformed import MalformedError
from jaxgrad.torch._reading import module, unpickler
from jaxgrad.torch._reading.opcodes import OPCODES
from jaxgrad.torch._reading.torch_globals import REBUILD
from jaxgrad.torch._reading.unpickler import Global, Machine, Object


def load(data: bytes) -> Any:
    def persistent_load(pid: tuple[Any, ...]) -> Any:
        return pid

    return Machine(REBUILD, persistent_load).load(data)[0]


keys = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.text() | st.binary()
plain = st.recursive(
    keys | st.floats(allow_nan=False),
    lambda part: (
        st.lists(part)
        | st.tuples(part)
        | st.tuples(part, part, part, part)
        | st.dictionaries(keys | st.tuples(keys, keys), part)
        | st.sets(keys)
        | st.frozensets(keys)
    ),
)


@given(plain, st.integers(4, pickle.HIGHEST_PROTOCOL))
def test_plain_data_is_what_pickle_loads(value, protocol):
    assert load(pickle.dumps(value, protocol)) == value


@given(st.lists(st.text() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.none()))
def test_plain_data_of_pytorchs_protocol(value):
    value = {"a": value, "b": {"c": tuple(value)}}
    assert load(pickle.dumps(value, 2)) == value


@settings(max_examples=500)
@given(st.binary() | st.lists(st.sampled_from(sorted(OPCODES))).map(bytes))
def test_any_bytes_load_or_are_malformed(data):
    try:
        load(data)
    except MalformedError as error:
        assert error.reason  # noqa: PT017 (either way is right)


def test_shared_and_recursive_structure_is_kept():
    loop: list[Any] = [1]
    loop.append(loop)
    loaded = load(pickle.dumps(loop, 2))
    assert loaded[1] is loaded
    inside: tuple[Any, ...] = ([],)
    inside[0].append(inside)
    loaded = load(pickle.dumps(inside, 2))  # written with POP
    assert loaded[0][0] is loaded


def test_python2_strings_and_integers():
    assert load(b"\x80\x02]q\x01(U\x03abcT\x02\0\0\0\xe9xI12345678901\ne.") == [
        "abc",
        "éx",
        12345678901,
    ]


def test_globals_and_calls_stay_inert():
    loaded = load(b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.")
    assert isinstance(loaded, Object)
    assert (loaded.cls, loaded.args) == ("os.system", ("true",))
    assert load(b"\x80\x02cbuiltins\neval\n.") == Global("builtins.eval")
    made = load(b"\x80\x02c__main__\nNet\n)\x81}X\x01\0\0\0aNsb.")
    assert (made.cls, made.state) == ("__main__.Net", {"a": None})


DEEP = b")" + b"\x85" * 100_000


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "does not end with exactly one object (opcode STOP"),
        (b"NN", "does not end with exactly one object"),
        (b"(N", "does not end with exactly one object"),
        (b"\x82\x01", "not an opcode that torch.save writes (opcode 0x82 at byte 2"),
        (b"\x84\1\0\0\0", "not an opcode that torch.save writes"),
        (b"ios\nsystem\n", "not an opcode that torch.save writes"),
        (b"(cos\nsystem\no", "not an opcode that torch.save writes"),
        (b"\x97", "not an opcode that torch.save writes"),
        (b"Ptext\n", "not an opcode that torch.save writes"),
        (b"S'\\q'\n", "not an opcode that torch.save writes"),
        (b"cos\nsystem\n}b", "state set on a Global (opcode BUILD"),
        (b")}b", "state set on a tuple"),
        (b"NNR", "a call of a NoneType"),
        (b"cos\nsystem\n]R", "a call of os.system with a list of arguments"),
        (b"N)\x81", "an object made of a NoneType"),
        (b"cm\nC\n)\x81}b}b", "the state of a m.C is set twice"),
        (b"}" + DEEP + b"Ns", "a key holding a tuple"),
        (b"}]Ns", "a key holding a list"),
        (b"}(" + b"N" * 17 + b"tNs", "a key of 17 elements, at most 16 are read"),
        (b"(" + DEEP + b"\x91", "a key holding a tuple"),
        (b"(Nd", "a dict key without a value"),
        (b"](NNNu", "a dict key without a value"),
        (b"](NNu", "items set in a list"),
        (b"Na", "takes more than the stack holds"),
        (b"NNa", "elements appended to a NoneType"),
        (b"N(N\x90", "elements added to a NoneType"),
        (b"\x85", "takes more than the stack holds"),
        (b"t", "takes more than the stack holds"),
        (b"]N(at", "a mark above the top of the stack"),
        (b"h\x05", "memo entry 5 does not exist"),
        (b"Nq\x05", "memo entry 5 out of sequence"),
        (b"Nr\xff\xff\xff\xff", "memo entry 4294967295 out of sequence"),
        (b"NQ", "a persistent id that is not a tuple starting with its kind"),
        (b")Q", "a persistent id that is not a tuple starting with its kind"),
        (b"K\x01\x85Q", "a persistent id that is not a tuple starting with its kind"),
        (b"\x8b\xff\xff\xff\x7f", "ends inside an argument (opcode LONG4"),
        (b"\x8b\x00\x01\0\0" + b"\1" * 256, "an integer of 2048 bits, at most 1024"),
        (b"X\xff\xff\xff\xffabc", "ends inside an argument (opcode BINUNICODE"),
        (b"\x8d" + b"\xff" * 8, "ends inside an argument"),
        (b"X\1\0\0\0\xff", "can't decode byte 0xff"),
        (b"X\3\0\0\0\xed\xa0\x80", "can't decode byte 0xed"),
        (b"c" + b"m" * 2000 + b"\nC\n", "a global's name has more than 1024 bytes"),
        (b"X\x00\x08\0\0" + b"m" * 2048 + b"q\0h\0\x93", "name is longer than 1024 characters"),
        (b"NN\x93", "a global whose name is not a string"),
        (b"I999999999999999999999999999999\n", "invalid literal for int"),
        (b"ccollections\nOrderedDict\n](]e\x85R", "made of something other than pairs"),
        (b"cbuiltins\nset\n}\x85R", "a set of a dict"),
    ],
)
def test_hostile_pickles_are_refused(write_zip, write_legacy, body, reason):
    for write, entry in ((write_zip, "made/data.pkl"), (write_legacy, "object")):
        path = write(body)
        with pytest.raises(jgt.TorchFileError) as caught:
            jgt.read(path)
        assert (caught.value.path, caught.value.entry) == (str(path), entry)
        assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("body", "entry", "reason"),
    [
        # A dict and a list that hold themselves.
        (b"}q\0X\1\0\0\0ah\0s", "a.a.a.a", "nested deeper than 128 levels, or inside itself"),
        (b"]q\0h\0a", "0.0.0.0", "nested deeper than 128 levels, or inside itself"),
        (DEEP, "0.0.0.0", "nested deeper than 128 levels, or inside itself"),
        # Each list holds the one before twice: 2**60 paths.
        (b"K\1" + b"2\x86".replace(b"2", b"q\0h\0") * 60, "0.0.0", "too many names"),
        (b"}(X\3\0\0\0a.bNX\1\0\0\0a}X\1\0\0\0bNsu", "a.b", "two entries have this name"),
        (b"}(K\1NX\1\0\0\x001Nu", "1", "two entries have this name"),
    ],
)
def test_graphs_without_end_are_refused(write_zip, body, entry, reason):
    start = time.perf_counter()
    with pytest.raises(jgt.TorchFileError) as caught:
        jgt.read(write_zip(body))
    assert caught.value.entry.startswith(entry)
    assert reason in caught.value.reason
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    ("limit", "body", "reason"),
    [
        ("MAX_OPCODES", b"]" * 60, "the pickle has more than 50 opcodes"),
        # Two bytes, again and again, for a set of 30 elements.
        (
            "MAX_OPCODES",
            b"](" + b"K\1" * 30 + b"eq\0cbuiltins\nset\nq\1h\1h\0\x85Rh\1h\0\x85R",
            "the pickle needs more than 50 steps",
        ),
        ("MAX_NON_STRING_KEYS", b"}(" + b"K\1N" * 51 + b"u", "more than 50 keys that are not"),
    ],
)
def test_work_is_limited(monkeypatch, write_zip, limit, body, reason):
    monkeypatch.setattr(unpickler, limit, 50)
    with pytest.raises(jgt.TorchFileError, match=reason):
        jgt.read(write_zip(body))


def test_a_long_pickle_is_refused_before_it_is_read(monkeypatch, write_zip, write_legacy):
    monkeypatch.setattr("jaxgrad.torch._reading.zip_file.MAX_PICKLE_BYTES", 50)
    monkeypatch.setattr(unpickler, "MAX_PICKLE_BYTES", 50)
    long = b"X\x80\0\0\0" + b"a" * 128
    with pytest.raises(jgt.TorchFileError, match="a pickle of 136 bytes, at most 50 are read"):
        jgt.read(write_zip(long))
    with pytest.raises(jgt.TorchFileError, match="ends inside an argument"):
        jgt.read(write_legacy(long))


def test_names_cost_their_length(monkeypatch, write_zip):
    monkeypatch.setattr(module, "MAX_NAMES_COST", 10_000)
    key = b"X\x00\x04\0\0" + b"k" * 1024
    # One long key at every level: the bytes are linear, the names would be quadratic.
    with pytest.raises(jgt.TorchFileError, match="too many names"):
        jgt.read(write_zip((b"}" + key) * 20 + b"N" + b"s" * 20))


def test_a_long_history_is_one_value(write_zip):
    made = b"}(" + b"X\4\0\0\0loss](" + b"K\1" * 1025 + b"eX\3\0\0\0few](K\1K\2eu"
    values = jgt.read(write_zip(made)).values
    assert values == {"loss": (1,) * 1025, "few.0": 1, "few.1": 2}


def test_nothing_is_run_or_imported(write_zip):
    bodies = (
        b"cantigravity\nfly\n)R",
        b"cos\nsystem\nX\4\0\0\0true\x85R",
        b"cbuiltins\nexec\nX\x01\0\0\x001\x85R",
        b"cantigravity\nC\n)\x81}b",
    )
    events: list[str] = []
    watching = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in ("exec", "compile", "import", "os.system", "pickle.find_class"):
            events.append(event)

    jgt.read(write_zip(b"N"))
    sys.addaudithook(hook)  # can not be removed, only switched off
    for body in bodies:
        path = write_zip(body)
        assert jgt.read(path).opaque
    watching = False
    assert not [event for event in events if event != "import"]
    assert "antigravity" not in sys.modules
