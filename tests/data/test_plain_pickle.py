"""Pickles of plain data come out as by pickle itself; whatever else they want is refused, and nothing is done."""

import copyreg
import os
import pickle
import struct
import time

import numpy as np
import pytest

from granvit.data.sources.plain_pickle import load

shared = ["a", "b"]
PLAIN = [
    {"n": [0, 1, -1, 255, 65536, 2**40, -(2**70), 1.5, True, None], "s": ["é🐈", "", b"\x00\xff", shared, shared]},
    ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {1: {2: [3, {}]}}),
    list(range(3000)),
    {str(n): n for n in range(3000)},
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("data", PLAIN)
def test_plain_data_comes_out_as_by_pickle(protocol, data):
    assert load(pickle.dumps(data, protocol)) == data


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["ab", "c"]),
        np.array([True, False]),
        np.zeros((0, 4), dtype=np.float32),
        np.int64(7),
        np.float32(0.5),
    ],
)
def test_arrays_come_out_as_lists(protocol, array):
    assert load(pickle.dumps({"a": array, "b": [array]}, protocol)) == {"a": array.tolist(), "b": [array.tolist()]}


def test_what_python_2_wrote():
    assert load(b"(lp0\n(dp1\nS'sent'\np2\nS'the \\'red\\' one'\np3\nsS'n'\nI7\nsS'u'\nV\\u00e9\nsa.") == [
        {"sent": "the 'red' one", "n": 7, "u": "é"}
    ]


class Calls:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


class Built:
    def __setstate__(self, state):
        raise AssertionError("it was called")

    def __getstate__(self):
        return {"a": 1}


def fresh(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


HOSTILE = {
    "os.system": pickle.dumps(Calls(os.system, "touch HERE")),
    "os.system, protocol 0": pickle.dumps(Calls(os.system, "touch HERE"), 0),
    "os.system as Python 2 says it": b"cposix\nsystem\n(S'touch HERE'\ntR.",
    "INST": b"(S'touch HERE'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch HERE'\no.",
    "eval": pickle.dumps(Calls(eval, "open('HERE', 'w')")),
    "exec": pickle.dumps(Calls(exec, "open('HERE', 'w')")),
    "getattr": b"cbuiltins\ngetattr\n(cos\nX\nS'system'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'HERE'\ntR.",
    "numpy.save": b"cnumpy\nsave\n(S'HERE'\n(ltR.",
    "numpy.memmap": b"cnumpy\nmemmap\n(S'HERE'\ntR.",
    "numpy.f2py": b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n(dtR.",
    "a name with dots": fresh(b"\x8c\x05numpy\x8c\x0ectypeslib.os.x\x93"),
    "ndarray called": b"cnumpy\nndarray\n((I1000000000\nI1000000000\nttR.",
    "dtype of objects": b"cnumpy\ndtype\n(S'O8'\ntR.",
    "dtype of fields": b"cnumpy\ndtype\n((lp0\n(S'a'\nS'O8'\ntatR.",
    "array of objects": pickle.dumps(np.array([Calls(os.system, "touch HERE")], dtype=object)),
    "structured array": pickle.dumps(np.zeros(2, dtype=[("a", "i4"), ("b", "O")])),
    "copyreg": pickle.dumps(Built(), 0),
    "copyreg.__newobj__": b"ccopyreg\n__newobj__\n(cos\n_wrap_close\ntR.",
    "extension registry": b"\x82\x01.",
    "NEWOBJ": pickle.dumps(Built(), 2),
    "NEWOBJ_EX": fresh(b"\x8c\x02os\x8c\x06system\x93)}\x92"),
    "persistent id": b"Pfile\n.",
    "binary persistent id": b"K\x01Q.",
    "a set": pickle.dumps({1, 2}),
    "state of a dict": b"(d(dS'a'\nI1\nsb.",
    "state of a global": b"c_codecs\nencode\nN(dS'__call__'\nI1\ns\x86b.",
    "call of a string": b"S'dtype'\n(S'i8'\ntR.",
    "a huge memo": fresh(b"Nr\xfe\xff\xff\xff", b"h\x00"),
    "a huge frame": fresh(b"\x95" + struct.pack("<Q", 2**62)),
    "huge bytes": fresh(b"\x8e" + struct.pack("<Q", 2**40)),
    "a huge string": fresh(b"\x8d" + struct.pack("<Q", 2**62)),
    "a huge integer": fresh(b"\x8b\xff\xff\xff\x7f"),
    "an integer of 2000 bytes": fresh(b"\x8b" + struct.pack("<I", 2000) + b"\x7f" * 2000),
    "a negative length": b"T\xff\xff\xff\xff.",
    "many digits": b"L" + b"9" * 5000 + b"L\n.",
    "an array larger than its bytes": pickle.dumps(np.arange(4)).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "lists without end": fresh(
        b"\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93(C\x00\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02u1\x85R"
        b"J\xff\xff\xff\x7fK\x00\x86\x8c\x01CtR" + b"a"
    ),
    "one array over and over": b"c_codecs\nencode\np0\n0"
    + b"(V"
    + b"a" * 1_000_000
    + b"\nV\ntp1\n0"
    + b"g0\ng1\nR" * 100,
    "an unhashable key": b"(d(l(ls.",
    "no mark": b"t.",
    "an empty stack": b".",
    "no end": b"I1\n",
    "not in the memo": b"g7\n.",
    "no pickle": b"\x89PNG\r\n",
    "nothing": b"",
    "out of band": fresh(b"\x97"),
    "odd items": b"(I1\nd.",
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickles_are_refused_and_do_nothing(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(copyreg, "_extension_registry", {})
    begun = time.monotonic()
    with pytest.raises(ValueError, match="not a pickle of plain data"):
        load(payload)
    assert time.monotonic() - begun < 2 and list(tmp_path.iterdir()) == []


def test_deep_and_cyclic_data_crash_nothing():
    deep = load(b"]" * 100_000 + b"a" * 99_999 + b".")
    assert isinstance(deep, list)
    cyclic = load(b"]q\x00h\x00a.")
    assert cyclic[0] is cyclic


def test_as_many_marks_as_bytes_take_linear_time():
    begun = time.monotonic()
    load(b"(" * 200_000 + b"t" * 200_000 + b".")
    assert time.monotonic() - begun < 5
