"""An unpickler for tensors and plain containers that cannot build anything else.

Python's unpickler calls any function that a file names and allocates any size that it states: a memo of a billion
entries (`LONG_BINPUT`), a buffer of a terabyte (`BYTEARRAY8`). This one supports the operations that `torch.save`
writes; its memory is bounded by the size of the file, and keys of dictionaries are strings or numbers.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any

from monarchrt.models.errors import printable


class UnsafePickleError(ValueError):
    """A pickle that refers to something other than tensors, which could run arbitrary code."""


_MARK = object()
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_INTEGERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING")
_VALUES = frozenset((*_INTEGERS, *_TEXTS, "FLOAT", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"))
_IGNORED = frozenset(("PROTO", "FRAME"))
_STORE, _FETCH = frozenset(("PUT", "BINPUT", "LONG_BINPUT")), frozenset(("GET", "BINGET", "LONG_BINGET"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(data: bytes | io.BytesIO, *, build: dict[tuple[str, str], Any], storage: Callable[..., Any]) -> Any:
    """Reads a pickle.

    Examples:
        >>> import pickle
        >>> read_pickle(pickle.dumps({"a": [1, None]}), build={}, storage=print)
        {'a': [1, None]}
        >>> read_pickle(pickle.dumps(print), build={}, storage=print)
        Traceback (most recent call last):
        ...
        monarchrt.models.checkpoints.plain_pickle.UnsafePickleError: it asks for builtins.print

    Args:
        data: The pickle, or a file positioned at its beginning, which is advanced to its end.
        build: Allowed globals by module and name: functions, which are called with the arguments in the file, and other
            values, which may only be arguments.
        storage: Called with each persistent id.

    Returns:
        The object.

    Raises:
        UnsafePickleError: If it refers to another global, or creates objects in another way.
        ValueError: If it is damaged.
    """
    machine = _Machine(build, storage)
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                return machine.pop()
            machine.step(operation.name, argument)
    except (IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
    raise ValueError("its pickle has no end")


class _Machine:
    def __init__(self, build: dict[tuple[str, str], Any], storage: Callable[..., Any]):
        self._allowed, self._storage = build, storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("its pickle is damaged (a mark is taken for a value)")
        return value

    def step(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _NEW:
            self._stack.append(_NEW[name]())
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _STORE:
            self._memo[int(argument)] = self._stack[-1]
        elif name in _FETCH:
            self._stack.append(self._memo[int(argument)])
        elif name in _TUPLES:
            self._stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
        elif (method := getattr(self, f"op_{name.lower()}", None)) is not None:
            method(argument)
        else:
            raise UnsafePickleError(f"it makes an object by {name}")

    def op_mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def op_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def op_pop(self, _: Any) -> None:
        self._stack.pop()

    def op_pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def op_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def op_list(self, _: Any) -> None:
        self._stack.append(self._since_mark())

    def op_dict(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set(items)

    def op_append(self, _: Any) -> None:
        self._extend([self.pop()])

    def op_appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def op_additems(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("its pickle is damaged (items without a list)")
        self._stack[-1].extend(items)

    def op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def op_setitems(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict) or len(items) % 2:
            raise ValueError("its pickle is damaged (entries without a dictionary)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | bytes | None):
                raise UnsafePickleError(f"a dictionary in it has a key that is a {type(key).__name__}")
            self._stack[-1][key] = value

    def op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._named(module, name)

    def op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._named(module, name)

    def _named(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in self._allowed:
            raise UnsafePickleError(f"it asks for {printable(f'{module}.{name}')}")
        self._stack.append(self._allowed[module, name])

    def op_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not callable(function) or not isinstance(arguments, tuple):
            raise UnsafePickleError("it calls something that is not a function")
        self._stack.append(function(*arguments))

    def op_build(self, _: Any) -> None:  # torch stores versions of modules as attributes of the dictionary
        self.pop()

    def op_binpersid(self, _: Any) -> None:
        self._stack.append(self._storage(self.pop()))
