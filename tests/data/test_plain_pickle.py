"""Pickles of plain data come out as by pickle itself; whatever else they want is refused, and nothing is done."""

import os
import pickle
import struct
import time

import numpy as np
import pytest

from granvit.data.sources.plain_pickle import load

shared = ["a", "b"]
PLAIN = {
    "numbers": [0, 1, -1, 255, 65536, 2**40, -(2**70), 1.5, True, None],
    "texts": ["é🐈", "", b"\x00\xff", shared, shared],
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {1: {2: [3, {}]}}),
    "a list in several pieces": list(range(3000)),
    "a dict in several pieces": {str(n): n for n in range(3000)},
}
ARRAYS = [
    np.arange(6).reshape(2, 3),
    np.arange(6, dtype=">i2").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(["ab", "c"]),
    np.array([True, False]),
    np.zeros((0, 4), dtype=np.float32),
    np.int64(7),
    np.float32(0.5),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_out_as_by_pickle_and_arrays_as_lists(protocol):
    assert load(pickle.dumps(PLAIN, protocol)) == PLAIN
    assert load(pickle.dumps({"a": ARRAYS, "b": ARRAYS}, protocol)) == dict.fromkeys("ab", [a.tolist() for a in ARRAYS])


def test_what_python_2_wrote():
    assert load(b"(lp0\n(dp1\nS'sent'\np2\nS'the \\'red\\' one'\np3\nsS'n'\nI7\nsS'u'\nV\\u00e9\nsa.") == [
        {"sent": "the 'red' one", "n": 7, "u": "é"}
    ]


class Calls:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def fresh(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


REFUSED = {  # one payload a reason
    "a function": (pickle.dumps(Calls(os.system, "touch HERE")), "use '(posix|nt) system'"),
    "a function, in text": (pickle.dumps(Calls(os.system, "touch HERE"), 0), "use '(posix|nt) system'"),
    "a path of names": (fresh(b"\x8c\x05numpy\x8c\x0ectypeslib.os.x\x93"), "use 'numpy ctypeslib.os.x'"),
    "an allocation": (b"cnumpy\nndarray\n((I1000000000\nI1000000000\nttR.", "call ndarray"),
    "a call of a string": (b"S'dtype'\n(S'i8'\ntR.", "call a str"),
    "INST": (b"(S'touch HERE'\nios\nsystem\n.", "make objects, by INST"),
    "NEWOBJ": (fresh(b"c_codecs\nencode\n)\x81"), "make objects, by NEWOBJ"),
    "persistent id": (b"K\x01Q.", "make objects, by BINPERSID"),
    "extension registry": (b"\x82\x01.", "make objects, by EXT1"),
    "state of a dict": (b"(d(dS'a'\nI1\nsb.", "expected a tuple, got a dict"),
    "state of a function": (b"c_codecs\nencode\nN(dS'__call__'\nI1\ns\x86b.", "set the state"),
    "array of objects": (pickle.dumps(np.array([Calls(os.system, "touch HERE")], dtype=object)), "got type 'O8'"),
    "dtype of fields": (b"cnumpy\ndtype\n((lp0\n(S'a'\nS'O8'\ntatR.", "got type \\["),
    "an array larger than its bytes": (
        pickle.dumps(np.arange(4)).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"), "cannot reshape",
    ),
    "two thousand million empty lists, and an item": (
        fresh(
            b"\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93(C\x00\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02u1\x85R"
            b"J\xff\xff\xff\x7fK\x00\x86\x8c\x01CtR" + b"a"
        ),
        "index",
    ),
    "one array over and over": (
        b"c_codecs\nencode\np0\n0(V" + b"a" * 1_000_000 + b"\nV\ntp1\n0" + b"g0\ng1\nR" * 100,
        "more than 20000000 steps",
    ),
    "an integer of 2000 bytes": (fresh(b"\x8b" + struct.pack("<I", 2000) + b"\x7f" * 2000), "10,000 bits"),
    "many digits": (b"L" + b"9" * 5000 + b"L\n.", "digits"),
    "bytes that are not there": (fresh(b"\x8e" + struct.pack("<Q", 2**40)), "expected 1099511627776 bytes"),
    "an unhashable key": (b"(d(l(ls.", "unhashable"),
    "odd items": (b"(I1\nd.", "zip"),
    "no mark": (b"t.", "index"),
    "not in the memo": (b"g7\n.", "7"),
    "no end": (b"I1\n", "pickle exhausted"),
    "no pickle": (b"\xff\xd8", "opcode"),
}  # fmt: skip


@pytest.mark.parametrize(("payload", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_anything_else_is_refused_and_does_nothing(payload, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = time.process_time()
    with pytest.raises(ValueError, match=f"not a pickle of plain data: .*{reason}"):
        load(payload)
    assert time.process_time() - begun < 2 and list(tmp_path.iterdir()) == []


def test_deep_and_cyclic_data_crash_nothing():
    deep = load(b"]" * 100_000 + b"a" * 99_999 + b".")
    assert isinstance(deep, list)
    cyclic = load(b"]q\x00h\x00a.")
    assert cyclic[0] is cyclic


def test_as_many_marks_as_bytes_take_linear_time():
    begun = time.process_time()
    load(b"(" * 200_000 + b"t" * 200_000 + b".")
    assert time.process_time() - begun < 5
