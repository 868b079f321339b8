"""Machine code of NVIDIA GPUs (SASS) read where no GPU is: its loops, and what a way through them issues.

A warp's scheduler issues one instruction a clock, whatever it does and whether or not its guard is true. So the
instructions of a loop, times how often warps run it, say how long a kernel must take at least (floors.py).
"""

from __future__ import annotations

import heapq
import linecache
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Instruction:
    """guard: the predicate that it runs under ("@!P0"), or "". lines: (file, number) that it was compiled from, the
    innermost first, then where that was inlined."""

    guard: str
    opcode: str
    operands: str
    lines: tuple[tuple[str, int], ...] = ()

    def is_a(self, opcode: str, *texts: str) -> bool:
        """Whether it has this opcode (a regular expression) and each text stands in one of its source lines."""
        if not re.fullmatch(opcode, self.opcode):
            return False
        sources = [linecache.getline(*line) for line in self.lines]
        return all(any(text in source for source in sources) for text in texts)

    @property
    def targets(self) -> list[str]:
        """Labels that it may go to. A call comes back, and BSSY and the like only name a label."""
        if not self.opcode.startswith(("BRA", "JMP", "BRX", "JMX")):
            return []
        labels = re.findall(r"`\((\S+?)\)", self.operands)
        if not labels:
            raise ValueError(f"{self.opcode} {self.operands} goes to an address that is computed: it can't be followed")
        return labels

    @property
    def ends(self) -> bool:
        """Whether nothing after it is reached from it: it has no condition, neither a guard nor one of a branch."""
        if self.opcode.startswith("BRA"):
            return not self.guard and self.opcode == "BRA" and self.operands.startswith("`")
        return not self.guard and self.opcode.startswith(("EXIT", "RET", "JMP"))


@dataclass
class Block:
    """Instructions that follow one another, and the numbers of the blocks that may come next."""

    instructions: list[Instruction] = field(default_factory=list)
    following: set[int] = field(default_factory=set)


class Region:
    """Part of a function's code with one way in: all of it, or a loop, whose `ends` go back to its first block."""

    def __init__(self, blocks: list[Block], first: int, members: Iterable[int], ends: Iterable[int]) -> None:
        self.blocks, self.first, self.members, self.ends = blocks, first, frozenset(members), frozenset(ends)
        self.loops: list[Region] = []  # directly inside, in the code's order

    def __iter__(self) -> Iterator[Region]:
        """This region and all inside it."""
        yield self
        for loop in self.loops:
            yield from loop

    @cached_property
    def own(self) -> list[int]:
        """Blocks that no inner loop has."""
        return sorted(self.members.difference(*(loop.members for loop in self.loops)))

    @property
    def instructions(self) -> list[Instruction]:
        """Its own, in the code's order."""
        return [instruction for number in self.own for instruction in self.blocks[number].instructions]

    def nested(self, depth: int) -> list[Region]:
        """Its loops, each the only one inside that before it. Raises ValueError where there are not `depth`."""
        loops: list[Region] = []
        region = self
        while len(region.loops) == 1:
            loops.append(region := region.loops[0])
        if len(loops) != depth or region.loops:
            raise ValueError(f"the code's loops are not {depth}, one inside the other: they are not what is counted")
        return loops

    def holds(self, opcode: str, *texts: str) -> bool:
        """Whether an instruction of its own is_a(opcode, *texts)."""
        return any(it.is_a(opcode, *texts) for it in self.instructions)

    def loop(self, opcode: str, *texts: str) -> Region:
        """The only loop with an instruction of its own that is_a(opcode, *texts). Raises ValueError where there are
        none or several."""
        loops = [loop for loop in self if loop is not self and loop.holds(opcode, *texts)]
        if len(loops) != 1:
            raise ValueError(f"{len(loops)} loops have {opcode} from lines with {', '.join(texts)}, not one")
        return loops[0]

    def through(self, *stops: Region) -> list[Instruction]:
        """The least that is issued from the first block to an end, by way of these inner loops in this order. What is
        issued inside inner loops is not counted."""
        firsts = [stop.first for stop in stops]

        def weigh(number: int) -> list[Instruction]:
            return self.blocks[number].instructions if number in self.own else []

        def advance(done: int, number: int) -> int:
            return done + (firsts[done : done + 1] == [number])

        way = self._least(weigh, advance, len(stops))
        if way is None:
            raise ValueError("no way through the code passes these loops in this order")
        return way

    def doing(self, count: int, opcode: str, *texts: str) -> list[Instruction]:
        """The least that is issued from the first block to an end with `count` instructions that is_a(opcode, *texts)
        tells, inner loops run as often as that takes. With a few more where no way has as many: some run in pairs, the
        second under a guard. Raises ValueError where no way has up to twice as many."""

        def advance(done: int, number: int) -> int:
            return done + sum(it.is_a(opcode, *texts) for it in self.blocks[number].instructions)

        for goal in range(count, 2 * count + 1):
            if way := self._least(lambda number: self.blocks[number].instructions, advance, goal):
                return way
        raise ValueError(f"no way through the code has {count} {opcode} from lines with {', '.join(texts)}")

    def exactly(self, **counts: int) -> list[Instruction] | None:
        """The least that is issued from the first block to an end with so many instructions of each opcode that is
        named (its first word), inner loops run as often as that takes. None where there is no such way."""

        def advance(done: tuple[int, ...], number: int) -> tuple[int, ...]:
            names = Counter(instruction.opcode.split(".")[0] for instruction in self.blocks[number].instructions)
            return tuple(count + names[name] for count, name in zip(done, counts, strict=True))

        return self._least(
            lambda number: self.blocks[number].instructions, advance, tuple(counts.values()), tuple(0 for _ in counts)
        )

    def _least(
        self, weigh: Callable[[int], list[Instruction]], advance: Callable[[Any, int], Any], goal: Any, nothing: Any = 0
    ) -> list[Instruction] | None:
        """Dijkstra over (block, how much is done): from the first block to an end with `goal` done, never more. None
        where there is no way. Done is a number, or a tuple of several."""

        def too_much(done: Any) -> bool:
            return any(map(int.__gt__, done, goal)) if isinstance(goal, tuple) else done > goal

        start = (self.first, advance(nothing, self.first))
        came: dict[tuple, tuple | None] = {}
        heap = [(len(weigh(self.first)), start, None)]
        while heap:
            cost, state, before = heapq.heappop(heap)
            if state in came or too_much(state[1]):
                continue
            came[state] = before
            number, done = state
            if number in self.ends and done == goal:
                way = []
                while state is not None:
                    way[:0] = weigh(state[0])
                    state = came[state]
                return way
            for after in self.blocks[number].following & self.members - {self.first}:
                heapq.heappush(heap, (cost + len(weigh(after)), (after, advance(done, after)), state))
        return None


def without(way: list[Instruction], part: list[Instruction]) -> list[Instruction]:
    """What a way issues more than `part`, a way through the same code."""
    known = {id(instruction) for instruction in part}
    return [instruction for instruction in way if id(instruction) not in known]


# ---- from a cubin to regions ----


def disassemble(cubin: bytes) -> str:
    """nvdisasm's listing, with source lines where the cubin has them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", "-gi", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


LINE = re.compile(r'(?:File|inlined at) "([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;?\s*$")


def functions(listing: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Region]:
    """{name: its code} of each function in nvdisasm's listing whose name is wanted."""
    sections = re.split(r"^\s*\.section\s+", listing, flags=re.MULTILINE)[1:]
    names = [re.match(r"\.text\.([^,\s]+)", section) for section in sections]
    return {
        name[1]: function(section)
        for name, section in zip(names, sections, strict=True)
        if name and wanted(name[1])
    }


def function(listing: str) -> Region:
    """A function's code with its loops."""
    blocks, labels = [Block()], {}
    lines: list[tuple[str, int]] = []
    fresh = True  # the next line of source begins a new chain
    for text in listing.splitlines():
        if label := re.match(r"(?!\.text\.)([.$]\S+):$", text):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif text.lstrip().startswith("//## File"):
            lines, fresh = [] if fresh else lines, False
            lines.append((LINE.search(text)[1], int(LINE.search(text)[2])))
        elif parts := INSTRUCTION.search(text):
            fresh = True
            instruction = Instruction(parts[1] or "", parts[2], parts[3], tuple(lines))
            blocks[-1].instructions.append(instruction)
            if instruction.targets or instruction.opcode.startswith(("EXIT", "RET")):
                blocks.append(Block())
    for number, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else Instruction("", "EXIT", "")
        block.following = {labels[target] for target in last.targets}
        if not last.ends and number + 1 < len(blocks):
            block.following.add(number + 1)
    return with_loops(blocks)


def with_loops(blocks: list[Block]) -> Region:
    """The blocks that the first one leads to, with their natural loops (Aho, Sethi and Ullman): one for every block
    that lies on each way to a block which goes back to it."""
    reached = _reached({0}, lambda number: blocks[number].following)
    before: dict[int, set[int]] = {number: set() for number in reached}
    for number in reached:
        for after in blocks[number].following:
            before[after].add(number)
    passed = {number: reached for number in reached} | {0: {0}}  # on each way to a block
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            must = {number}.union(set.intersection(*(passed[earlier] for earlier in before[number])))
            changed |= must != passed[number]
            passed[number] = must
    latches: dict[int, set[int]] = {}
    for number in reached:
        for after in blocks[number].following & passed[number]:
            latches.setdefault(after, set()).add(number)
    loops = []
    for first, last in latches.items():
        members = _reached(last - {first}, lambda number, first=first: before[number] - {first})
        loops.append(Region(blocks, first, members | {first}, last))
    ends = {n for n in reached if not blocks[n].following}
    if not ends:  # it leaves from inside a loop
        ends = {n for n in reached if blocks[n].instructions[-1].opcode == "EXIT"}
    whole = Region(blocks, 0, reached, ends)
    for loop in sorted(loops, key=lambda loop: (-len(loop.members), loop.first)):
        [region for region in whole if loop.members <= region.members][-1].loops.append(loop)
    for region in whole:
        region.loops.sort(key=lambda loop: loop.first)
    return whole


def _reached(start: set[int], following: Callable[[int], set[int]]) -> set[int]:
    """Blocks that `start` leads to, itself included."""
    reached, new = set(start), set(start)
    while new:
        new = set().union(*map(following, new)) - reached
        reached |= new
    return reached


# ---- what instructions are ----

CLASSES = {
    "tensor core": r"HMMA|HGMMA|UTC\w*MMA|IMMA|DMMA|LDSM|WARPGROUP",
    "float": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2",
    "double": r"D(FMA|ADD|MUL|SETP)",
    "special function": "MUFU",
    "conversion": r"[FI]2[FI]P?|F2FP|FRND",
    "branch": "BRA|BRX|JMP|EXIT|CALL|RET|BSSY|BSYNC|BREAK|WARPSYNC|BAR|NOP|DEPBAR|YIELD",
    "integer": r"IMAD|VIADD|IADD3|LEA|LOP3|SHF|IABS|VIADDMNMX|VIMNMX|IMNMX|ISETP|PRMT|SGXT|BMSK|POPC|FLO",
    "uniform": r"U[A-Z]\w*|R2UR|S2UR",
    "move, select, compare": r"MOV|CS2R|S2R|SEL|FSEL|FMNMX|FSETP|PLOP3|SHFL|VOTE|P2R|R2P|LDC|REDUX",
}
MEMORY = {"LDG": "load", "LD": "load", "STG": "store", "ST": "store", "LDGSTS": "load to shared memory"}
MEMORY |= {"LDS": "load of shared memory", "STS": "store to shared memory", "LDL": "load of a spill", "STL": "spill"}


def classify(instruction: Instruction) -> str:
    """What kind of work it is; a memory access with the bits that a lane moves."""
    base, *modifiers = instruction.opcode.split(".")
    if base in MEMORY:
        bits = re.search(r"\.(128|64|[US]?16|[US]?8)\b", instruction.opcode)
        return f"{MEMORY[base]}, {bits[1].lstrip('US') if bits else 32} bits"
    kinds = [kind for kind, pattern in CLASSES.items() if re.fullmatch(pattern, base)]
    return kinds[0] if kinds else "other"


def counted(instructions: list[Instruction]) -> dict[str, int]:
    """How many of each kind, the most frequent first; "guarded": how many of all run under a predicate."""
    kinds = Counter(map(classify, instructions))
    guarded = sum(bool(instruction.guard) for instruction in instructions)
    return dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))) | {"guarded": guarded}
