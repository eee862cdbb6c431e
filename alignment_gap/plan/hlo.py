"""The data that a compiled program moves: its collectives and its HBM traffic.

The compiler's own cost analysis counts the body of a loop once. Here every instruction counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions that move no bytes: names for parts of other buffers, control flow (its body counts), ends of copies.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|(partition|replica)-id"
    r"|.*-done|async-update"
)
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
# replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}: the ids may be given by an array of their own.
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\]"
    r"(?:,\s*device_ids=\(\[(?P<ids>[\d,]+)\](?:T\((?P<turn>[\d,]+)\))?\))?\s*\{(?P<spread>[^}]*)\}"
)
# The last result of a call of cuBLAS or cuDNN is its working memory, of which it may use none.
_WORKSPACE = re.compile(r", [su]8\[\d+\]\{0\}\)$")
_COUNTER = re.compile(r"[su]\d+\[\]")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_CALLED = re.compile(rf"(calls|to_apply|body|condition|{'|'.join(_BRANCHES)})=(\{{[^}}]*\}}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: its name, type, operation and operands; `text` is the line after the type."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def called(self, attribute: str) -> list[str]:
        """Names of the computations in an attribute such as "calls" or "body"."""
        return [
            name
            for key, value in _CALLED.findall(self.text)
            if key == attribute
            for name in re.findall(r"%([\w.\-]+)", value)
        ]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of a program.

    Attributes:
      kind: "all-gather" and so on; the TPU's fusion of an all-reduce and a slice is a "reduce-scatter".
      bytes: bytes of the operand or the result of one collective, whichever is larger, per device.
      count: number of runs in one call of the program.
      group: partition ids of its first group; for a permute, the first source and its target. Empty if a device sends
        its part to other TPU slices.
    """

    kind: str
    bytes: int
    count: int
    group: tuple[int, ...]


def parse(text: str) -> Program:
    """Reads the text of a compiled module."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            # Two brackets end the attributes of a kernel's instruction, which may go over several lines.
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, arguments = rest.partition("(")
    end = _closing("(" + arguments) - 1
    operands = re.findall(r"%([\w.\-]+)", arguments[:end])
    return Instruction(head[2], kind, opcode, tuple(operands), rest, bool(head[1]))


def _closing(text: str) -> int:
    """The index after the bracket that closes the text's first character."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def type_bytes(text: str, *, hbm_only: bool = False) -> int:
    """Bytes of an array's or tuple's type; with `hbm_only`, without arrays whose layout is in on-chip memory."""
    return sum(
        math.prod(int(size) for size in shape.split(",") if size) * _bits(dtype) // 8
        for dtype, shape, layout in _ARRAY.findall(text)
        if not (hbm_only and "S(" in layout)
    )


def _bits(dtype: str) -> int:
    """Bits of an element: the first number in the type's name, 8 for pred, 0 for a token."""
    size = re.search(r"\d+", dtype)
    return int(size[0]) if size else 8 * (dtype == "pred")


def trip_count(program: Program, loop: Instruction) -> int:
    """How often a while loop's body runs: the compiler's count, or else the bound in its condition over its step.

    If a loop may stop early, as a sampler's loop may, this is the maximum.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    name = loop.called("condition")[0]
    parts = [name, *(part for each in program.computations[name].values() for part in each.called("calls"))]
    bounds = [
        bound
        for part in parts
        for instruction in program.computations[part].values()
        if (bound := _integer(instruction)) is not None
    ]
    return -(-max(bounds, default=1) // _step(program, loop))


def _step(program: Program, loop: Instruction) -> int:
    """By how much the counter in a loop's condition grows in one run of its body; 1 if this cannot be read.

    The TPU's loops over the parts of a product, which pass parts on while they multiply, often count in steps of two.
    """
    condition, body = (program.computations[loop.called(key)[0]] for key in ("condition", "body"))
    counters = [
        int(index[1])
        for each in condition.values()
        if _COUNTER.match(each.type) and (index := re.match(r"get-tuple-element\(.*index=(\d+)", each.text))
    ]
    root = next(each for each in body.values() if each.is_root)
    if len(counters) != 1 or root.opcode != "tuple":
        return 1
    grown = body[root.operands[counters[0]]]
    inside = [each for name in grown.called("calls") for each in program.computations[name].values()]
    added = [_integer(each) for each in (*(body[name] for name in grown.operands), *inside)]
    steps = [step for step in added if step]
    return steps[0] if grown.opcode in ("add", "fusion") and len(steps) == 1 else 1


def _integer(instruction: Instruction) -> int | None:
    """The value of an integer constant; None for any other instruction."""
    value = re.match(r"constant\((\d+)\)", instruction.text)
    return int(value[1]) if value and _COUNTER.match(instruction.type) else None


def executed(program: Program) -> Iterator[tuple[str, int, bool]]:
    """Yields (computation, runs in one call, whether it is inside a fusion), once for every place that calls it.

    Of the branches of a conditional only one runs; the one with the least traffic counts, so that times are at best.
    """
    stack = [(program.entry, 1, False)]
    while stack:
        name, runs, fused = stack.pop()
        yield name, runs, fused
        for instruction in program.computations[name].values():
            if instruction.opcode == "while":
                times = runs * trip_count(program, instruction)
                stack += [(part, times, fused) for key in ("body", "condition") for part in instruction.called(key)]
            elif instruction.opcode == "fusion":
                stack += [(part, runs, True) for part in instruction.called("calls")]
            elif instruction.opcode == "conditional":
                branches = [part for key in _BRANCHES for part in instruction.called(key)]
                least = min(branches, key=lambda part: hbm_traffic(dataclasses.replace(program, entry=part)))
                stack.append((least, runs, fused))
            elif instruction.opcode in ("call", "async-start"):
                stack += [(part, runs, fused) for key in ("to_apply", "calls") for part in instruction.called(key)]


def collectives(program: Program, devices: int) -> list[Collective]:
    """All collectives between this many partitions; counts equal ones together, and ignores groups of one device."""
    counts: dict[tuple[str, int, tuple[int, ...]], int] = {}
    chains: set[tuple[str, str, int]] = set()
    for name, runs, _ in executed(program):
        for instruction in program.computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "send" and (between := re.search(r'transfer_type="(\w+)"', instruction.text)):
                # Between TPU slices, the host's runtime does the collective; the transfer type gives its name.
                sent = type_bytes(program.computations[name][instruction.operands[0]].type)
                key: tuple[str, int, tuple[int, ...]] = (between[1].lower().replace("_", "-"), sent, ())
                counts[key] = counts.get(key, 0) + runs
            if kind not in COLLECTIVES:
                continue
            times = runs
            # The TPU may spread a gather over several fusions. Each contains it, with the same chain id.
            if chain := re.search(r'chain_id="(\w+)"', instruction.text):
                channel = re.search(r"channel_id=(\d+)", instruction.text)
                link = (chain[1], channel[1] if channel else "", runs)
                if link in chains:
                    continue
                chains.add(link)
                # If the gather is not the loop's own, a single gather runs alongside all iterations of the loop.
                times = runs if "while/body" in instruction.text else 1
            group = _group(instruction.text, devices)
            if len(group) > 1:
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                key = (kind, _moved(program.computations[name], instruction), group)
                counts[key] = counts.get(key, 0) + times
    found = [Collective(kind, size, count, group) for (kind, size, group), count in counts.items()]
    return sorted(found, key=lambda each: -each.bytes * each.count)


def _moved(computation: Computation, instruction: Instruction) -> int:
    """Bytes of the operands or the results, whichever are more; the type of a "-start" holds operands and results."""
    operands = sum(type_bytes(computation[name].type) for name in instruction.operands if name in computation)
    if instruction.opcode.endswith("-start"):
        return max(operands, type_bytes(instruction.type) - operands) if operands else type_bytes(instruction.type)
    return max(operands, type_bytes(instruction.type))


def _group(text: str, devices: int) -> tuple[int, ...]:
    """The first group of partition ids, in any of the notations of XLA."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(number) for number in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, sizes = _numbers(iota[1]), _numbers(iota[2])
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(iota[3]) if iota[3] else None)
        return tuple(ids.reshape(groups)[0].tolist())
    if named := _MESH.search(text):
        axes = re.findall(r"'(\w+)'=(\d+)", named["axes"])
        ids = np.arange(math.prod(int(size) for _, size in axes))
        if named["ids"]:
            ids = ids.reshape(_numbers(named["ids"])).transpose(_numbers(named["turn"]) if named["turn"] else None)
        ids = ids.reshape([int(size) for _, size in axes])
        spread = re.findall(r"'(\w+)'", named["spread"])
        return tuple(ids[tuple(slice(None) if axis in spread else 0 for axis, _ in axes)].ravel().tolist())
    return tuple(range(devices))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def hbm_traffic(program: Program) -> int:
    """Bytes that a device reads from and writes to HBM in one call.

    The operands and results of an instruction count, unless they are in on-chip memory. If an operand is only sliced or
    indexed, only the slices count. If a buffer is updated in place, only the update counts.
    """
    return sum(
        runs * _traffic(program, program.computations[name], instruction)
        for name, runs, fused in executed(program)
        if not fused
        for instruction in program.computations[name].values()
    )


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if _FREE.fullmatch(opcode):
        return 0
    if opcode == "fusion":
        inside = program.computations[instruction.called("calls")[0]]
        return sum(_reads(program, instruction)) + _written(inside)
    hbm = functools.partial(type_bytes, hbm_only=True)
    is_library = opcode == "custom-call" and 'custom_call_target="__cu' in instruction.text
    result = hbm(_WORKSPACE.sub(")", instruction.type) if is_library else instruction.type)
    if opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * result
    operands = [hbm(computation[name].type) for name in instruction.operands if name in computation]
    if opcode == "dynamic-update-slice":
        return 2 * sum(operands[1:2])
    if opcode.endswith("-start"):
        return sum(operands)
    return result + sum(operands)


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for instruction in computation.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    return users


def _reads(program: Program, fusion: Instruction) -> list[int]:
    """For each operand of a fusion, the bytes that the fusion reads of it."""
    inside = program.computations[fusion.called("calls")[0]]
    parameters = {i.text.partition("(")[2].partition(")")[0]: i for i in inside.values() if i.opcode == "parameter"}
    users = _users(inside)
    found = [parameters.get(str(index)) for index in range(len(fusion.operands))]
    return [_read(program, users, each) if each else 0 for each in found]


def _read(program: Program, users: dict[str, list[Instruction]], parameter: Instruction) -> int:
    """Bytes that a fusion reads of an operand, from the instructions inside that use it; they may be fusions too."""
    if "S(" in parameter.type:
        return 0
    total = 0
    for user in users.get(parameter.name, []):
        if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter.name:
            total += type_bytes(user.type)
        elif _is_view(program, user):
            total += _read(program, users, user)
        elif user.opcode == "fusion":
            reads = zip(user.operands, _reads(program, user), strict=True)
            total += sum(size for name, size in reads if name == parameter.name)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue
        elif user.opcode != "tuple" and user.opcode not in COLLECTIVES:
            return type_bytes(parameter.type)
    return min(total, type_bytes(parameter.type))


def _is_view(program: Program, instruction: Instruction) -> bool:
    """Whether a fusion is its operand with another tiling, in place; TPU programs have such views of int8."""
    if instruction.opcode != "fusion" or "output_to_operand_aliasing" not in instruction.text:
        return False
    inside = program.computations[instruction.called("calls")[0]].values()
    return all(each.opcode in ("parameter", "copy", "bitcast") for each in inside)


def _written(inside: Computation) -> int:
    """Bytes of HBM that a fusion writes: its results, except operands that it passes through."""
    root = next(instruction for instruction in inside.values() if instruction.is_root)
    parts = [inside[name] for name in root.operands if name in inside] if root.opcode == "tuple" else [root]
    total = 0
    for part in parts:
        if part.opcode == "dynamic-update-slice":
            total += 0 if "S(" in part.type else type_bytes(inside[part.operands[1]].type)
        elif part.opcode not in ("parameter", "get-tuple-element", *COLLECTIVES):
            total += type_bytes(part.type, hbm_only=True)
    return total
