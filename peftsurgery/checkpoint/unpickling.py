"""What the pickle inside a torch file says, worked out without unpickling.

`pickletools.genops` turns the bytes into opcodes; `interpret` runs the few of them a saved state
dict needs on a stack of plain values. Names of classes and functions become `Symbol`s from a
closed list, never objects: nothing is imported and nothing is called. Source of the protocol:
CPython `pickletools`; of the calls: torch `torch/_utils.py` (`_rebuild_tensor_v2`, `_v3`,
`_rebuild_parameter`) and `torch/serialization.py` (`persistent_id`).
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass
from typing import NoReturn

from peftsurgery.checkpoint.dtypes import BITS, FROM_TORCH_NAMES
from peftsurgery.checkpoint.header import Limits, shape_problem
from peftsurgery.checkpoint.strict_json import shown
from peftsurgery.errors import UnsafeInputError

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
_UNTYPED = ("torch.storage", "UntypedStorage")
ALLOWED: frozenset[tuple[str, str]] = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch.storage", "TypedStorage"),
        _UNTYPED,
        *(("torch", name) for name in STORAGES),
        *(("torch", name) for name, dtype in FROM_TORCH_NAMES.items() if BITS[dtype] >= 8),
    }
)

_PUSH_ARGUMENT = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING"}
)
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MEMO_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_MEMO_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})


@dataclass(frozen=True)
class Symbol:
    """A global name of the pickle; only its name."""

    module: str
    name: str


@dataclass(frozen=True)
class StorageRef:
    dtype: str | None  # None: untyped, `numel` counts bytes
    key: str  # the member data/<key> of the zip
    numel: int


@dataclass(frozen=True)
class TensorRef:
    storage: StorageRef
    dtype: str
    offset: int  # in elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def interpret(data: bytes, *, where: str, limits: Limits) -> object:
    """The value of the pickle `data`: dicts, lists, tuples, scalars and TensorRefs.

    Raises UnsafeInputError, naming what was met, for any global, call or opcode outside the closed
    list and for malformed or oversized pickles.
    """
    machine = _Machine(where, limits)
    end = -1
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count >= limits.pickle_ops:
                machine.refuse(f"over {limits.pickle_ops} opcodes (Limits.pickle_ops)")
            machine.step(opcode.name, argument)
            end = position or 0
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        machine.refuse(f"malformed: {type(error).__name__}: {str(error)[:200]}", error)
    if end != len(data) - 1:
        machine.refuse(f"{len(data) - 1 - end} bytes trail behind the end of the pickle")
    return machine.result()


class _Machine:
    """The pickle stack machine on plain values: `stack`, and the stacks set aside by each open
    MARK.
    """

    def __init__(self, where: str, limits: Limits) -> None:
        self.where = where
        self.limits = limits
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, object] = {}

    def refuse(self, what: str, cause: BaseException | None = None) -> NoReturn:
        raise UnsafeInputError(f"{self.where}: pickle refused: {what}") from cause

    def result(self) -> object:
        if len(self.stack) != 1 or self.marks:
            self.refuse("malformed: the stack does not end with one value")
        return self.stack[0]

    def to_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def step(self, op: str, argument: object) -> None:
        stack = self.stack
        if op in _PUSH_ARGUMENT:
            stack.append(argument)
        elif op in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[op])
        elif op in _MEMO_PUT:
            self.memo[_index(argument)] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in _MEMO_GET:
            stack.append(self.memo[_index(argument)])
        elif op == "MARK":
            if len(self.marks) >= self.limits.pickle_depth:
                self.refuse(f"nested deeper than {self.limits.pickle_depth} (Limits.pickle_depth)")
            self.marks.append(stack)
            self.stack = []
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op == "EMPTY_LIST":
            stack.append([])
        elif op in _TUPLES:
            items = tuple(self.pop_last(_TUPLES[op]))
            stack.append(items)
        elif op == "TUPLE":
            items = tuple(self.to_mark())
            self.stack.append(items)
        elif op == "LIST":
            items = self.to_mark()
            self.stack.append(items)
        elif op == "DICT":
            items = self.to_mark()
            self.stack.append({})
            self.set_items(items)
        elif op == "SETITEM":
            self.set_items(self.pop_last(2))
        elif op == "SETITEMS":
            self.set_items(self.to_mark())
        elif op == "APPEND":
            self.extend(self.pop_last(1))
        elif op == "APPENDS":
            self.extend(self.to_mark())
        elif op == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            stack.append(self.symbol(module, name))
        elif op == "STACK_GLOBAL":
            module, name = self.pop_last(2)
            stack.append(self.symbol(module, name))
        elif op == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif op == "REDUCE":
            function, arguments = self.pop_last(2)
            stack.append(self.call(function, arguments))
        elif op == "BUILD":
            (state,) = self.pop_last(1)
            if not (isinstance(stack[-1], dict) and isinstance(state, dict)):
                self.refuse(f"BUILD on {_kind(stack[-1])}; only a state dict's _metadata is known")
        elif op not in ("PROTO", "FRAME", "STOP"):
            self.refuse(f"the opcode {op}, which no state dict needs")

    def pop_last(self, n: int) -> list:
        if len(self.stack) < n:
            self.refuse("malformed: the stack is empty")
        items = self.stack[-n:]
        del self.stack[-n:]
        return items

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            self.refuse(f"items are set on {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                self.refuse(f"a dictionary key of type {_kind(key)}; names are text")
            if key in target:
                self.refuse(f"the key {shown(key)} occurs twice")
            target[key] = value

    def extend(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            self.refuse(f"items are appended to {_kind(target)}")
        target.extend(items)

    def symbol(self, module: object, name: object) -> Symbol:
        if not (isinstance(module, str) and isinstance(name, str)):
            self.refuse("malformed: a global without a name")
        if (module, name) not in ALLOWED:
            self.refuse(
                f"it wants {shown(f'{module}.{name}')}, which is not among the few names a state "
                "dict needs. Nothing was run. If you trust the file, load it where it was made "
                "and save only its state dict, as safetensors."
            )
        return Symbol(module, name)

    def storage(self, identifier: object) -> StorageRef:
        match identifier:
            case ("storage", Symbol(module, name), str(key), str(), int(numel)) if numel >= 0:
                if (module, name) == _UNTYPED:
                    return StorageRef(None, key, numel)
                if module == "torch" and name in STORAGES:
                    return StorageRef(STORAGES[name], key, numel)
        self.refuse("a persistent id that is not a storage of a known type")

    def call(self, function: object, arguments: object) -> object:
        name = function.name if isinstance(function, Symbol) else _kind(function)
        match name, arguments:
            case "OrderedDict", ():
                return {}
            case "_rebuild_parameter", (TensorRef() as tensor, bool(), hooks) if not hooks:
                return tensor
            case "_rebuild_tensor_v2", (
                StorageRef() as storage,
                offset,
                shape,
                strides,
                _,
                hooks,
                *rest,
            ):
                if not hooks and len(rest) <= 1 and not any(rest) and storage.dtype:
                    return self.tensor(storage, storage.dtype, offset, shape, strides)
            case (
                "_rebuild_tensor_v3",
                (
                    StorageRef() as storage,
                    offset,
                    shape,
                    strides,
                    _,
                    hooks,
                    Symbol("torch", dtype),
                    *rest,
                ),
            ):
                if not hooks and len(rest) <= 1 and not any(rest) and dtype in FROM_TORCH_NAMES:
                    return self.tensor(storage, FROM_TORCH_NAMES[dtype], offset, shape, strides)
        self.refuse(f"a call of {name} with arguments that no state dict has")

    def tensor(
        self, storage: StorageRef, dtype: str, offset: object, shape: object, strides: object
    ) -> TensorRef:
        problem = shape_problem(shape, self.limits)
        if problem:
            self.refuse(f"a tensor with a wrong shape: {problem}")
        assert isinstance(shape, tuple | list)
        if not (
            type(offset) is int
            and offset >= 0
            and isinstance(strides, tuple)
            and len(strides) == len(shape)
            and all(type(stride) is int and 0 <= stride <= 2**48 for stride in strides)
        ):
            self.refuse(f"a tensor of shape {list(shape)} with wrong strides or offset")
        return TensorRef(storage, dtype, offset, tuple(shape), strides)


def _index(argument: object) -> int:
    if not isinstance(argument, int):
        raise ValueError("a memo slot without a number")
    return argument


def _kind(value: object) -> str:
    return f"{value.module}.{value.name}" if isinstance(value, Symbol) else type(value).__name__
