"""What an ONNX file may not do, found before a runtime reads it: without an ONNX library, without copying its tensors.

Refused are tensors whose data lies outside of the file's folder, tensors that declare more than is there, sparse
tensors, operators that no export has (loops and branches above all, which could run without end), graphs inside of
operators, and functions that call one another without end or grow beyond measure when they are inlined. Lengths in the
file are not trusted. Not limited is how large a tensor becomes while the graph runs: `Expand`, `Range`, `Resize` and
`Pad` are in every export, so that nothing would be gained by refusing `Tile` or `ConstantOfShape`.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from wsss_deploy.errors import ArtifactError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_FUNCTION_NAME, _FUNCTION_NODE, _FUNCTION_DOMAIN, _FUNCTION_DEFAULT = 1, 7, 10, 11
_NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_STRING, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 6, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
#: Fields that are looked at, by message: how each is encoded, and whether it may come more than once. Of a field that
#: comes otherwise than this, protobuf's readers pass over one and overwrite or merge the other, each in its own way,
#: so that a runtime could see another model than the one that was checked.
_ONCE, _OFTEN = False, True
_MODEL = {_MODEL_GRAPH: (_BYTES, _ONCE), _MODEL_FUNCTIONS: (_BYTES, _OFTEN)}
_GRAPH = dict.fromkeys((_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE), (_BYTES, _OFTEN))
_FUNCTION = dict.fromkeys((_FUNCTION_NAME, _FUNCTION_DOMAIN), (_BYTES, _ONCE))
_FUNCTION |= dict.fromkeys((_FUNCTION_NODE, _FUNCTION_DEFAULT), (_BYTES, _OFTEN))
_NODE = {_NODE_OP: (_BYTES, _ONCE), _NODE_DOMAIN: (_BYTES, _ONCE), _NODE_ATTRIBUTE: (_BYTES, _OFTEN)}
_ATTRIBUTE = dict.fromkeys((_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_SPARSE), (_BYTES, _ONCE))
_ATTRIBUTE |= dict.fromkeys((_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSES), (_BYTES, _OFTEN))
_TENSOR = {_TENSOR_DIMS: (_VARINT, _OFTEN), _TENSOR_TYPE: (_VARINT, _ONCE), _TENSOR_STRING: (_BYTES, _OFTEN)}
_TENSOR |= {_TENSOR_NAME: (_BYTES, _ONCE), _TENSOR_RAW: (_BYTES, _ONCE), _TENSOR_EXTERNAL: (_BYTES, _OFTEN)}
_ENTRY = dict.fromkeys((_ENTRY_KEY, _ENTRY_VALUE), (_BYTES, _ONCE))
_STRING = 8
#: Domains of operators that runtimes bring along; a runtime would take its own in place of a file's function there.
_RUNTIMES = ("ai.onnx", "com.microsoft", "com.ms.")
#: The standard's own domain, by both of its names.
STANDARD = frozenset({"", "ai.onnx"})
#: What exports have, of every family of encoders, precision and refinement (a test holds them against it) ...
_WRITTEN = """
    Abs Add And ArgMax Attention Cast Clip Concat Constant Conv Cos DequantizeLinear Div Einsum Equal Erf Exp Expand
    Floor Gather GatherND Gelu GreaterOrEqual Identity LayerNormalization Less Log MatMul Max Mod Mul Neg Not Pad
    QuantizeLinear Range ReduceL2 ReduceMean ReduceSum Relu Reshape Resize ScatterND Shape Sigmoid Sin Slice Softmax
    Split Sqrt Squeeze Sub Transpose Unsqueeze Where
"""
#: ... and what timm's other encoders may need: each does as much work as its inputs and outputs are large.
_HARMLESS = """
    AveragePool BatchNormalization Ceil Celu ConstantOfShape CumSum DepthToSpace Elu Flatten GatherElements Gemm
    GlobalAveragePool GlobalMaxPool Greater GroupNormalization HardSigmoid HardSwish InstanceNormalization LeakyRelu
    LessOrEqual LogSoftmax MaxPool Mean Min Mish Or PRelu Pow RMSNormalization Reciprocal ReduceL1 ReduceLogSumExp
    ReduceMax ReduceMin ReduceProd ReduceSumSquare RotaryEmbedding Round ScatterElements Selu Sign Size Softplus
    Softsign SpaceToDepth Sum Swish Tanh Tile TopK Trilu Xor
"""
#: Standard operators that a file may have; the export holds its graphs against them, too.
OPERATORS = frozenset(_WRITTEN.split()) | frozenset(_HARMLESS.split())
#: Bits of an element by TensorProto.DataType; of a string, one byte of the file at least.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 8: 8, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128}
_BITS |= {16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
_LONGEST_TEXT = 4096
#: Functions that call functions, and nodes once all of them are inlined; a refining graph of ours has some thousands.
_DEEPEST_CALL, _MOST_NODES = 32, 1_000_000

#: Domain and name of a function; None is the graph.
_Owner = tuple[str, str] | None
#: By number of a field: how it is encoded, whether it may come more than once.
_Fields = Mapping[int, tuple[int, bool]]


class _Malformed(Exception):
    pass


def check_onnx(path: Path) -> None:
    """Check the structure of an ONNX file.

    Args:
        path: The file.

    Raises:
        ArtifactError: It is damaged, or refused; the message names the tensor or the operator.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                _Checker(path, view).model()
            finally:
                view.release()
    except (_Malformed, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: is no ONNX model, or a damaged one ({error}); export it again") from error
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ArtifactError(f"{path}: cannot be read ({error}); check the file and its permissions") from error


class _Checker:
    def __init__(self, path: Path, view: memoryview) -> None:
        self._path, self._view = path, view
        self._functions: set[tuple[str, str]] = set()
        self._owner: _Owner = None
        # Nodes of the graph and of each function, and the functions among them.
        self._nodes: Counter[_Owner] = Counter()
        self._calls: defaultdict[_Owner, Counter[_Owner]] = defaultdict(Counter)
        self._inlined: dict[_Owner, int] = {}

    def model(self) -> None:
        parts = list(_fields(self._view, 0, len(self._view), _MODEL))
        for field, begin, end in parts:
            if field == _MODEL_FUNCTIONS:
                self._declare(*self._function(begin, end))
        for field, begin, end in parts:
            if field == _MODEL_GRAPH:
                self._graph(begin, end)
            elif field == _MODEL_FUNCTIONS:
                self._owner = self._function(begin, end)
                for inner, first, last in _fields(self._view, begin, end, _FUNCTION):
                    if inner == _FUNCTION_NODE:
                        self._node(first, last)
                    elif inner == _FUNCTION_DEFAULT:
                        self._attribute(first, last)
                self._owner = None
        if self._size(None, 0) > _MOST_NODES:
            raise ArtifactError(
                f"{self._path}: its functions call one another so often that more than {_MOST_NODES:,} operators would "
                "have to run; it is hostile, or refines with far more neighbours and steps than a runtime can bear"
            )

    def _declare(self, domain: str, name: str) -> None:
        if domain in STANDARD or domain.startswith(_RUNTIMES):
            raise ArtifactError(
                f"{self._path}: holds a function '{domain}::{name[:80]}' with the name of a runtime's own operator, "
                "which wsss-export never writes; refused: use a file of wsss-export"
            )
        self._functions.add((domain, name))

    def _function(self, begin: int, end: int) -> tuple[str, str]:
        return self._text(begin, end, _FUNCTION, _FUNCTION_DOMAIN), self._text(begin, end, _FUNCTION, _FUNCTION_NAME)

    def _size(self, owner: _Owner, depth: int) -> int:
        """Nodes of the graph or a function once every call in it is inlined."""
        if depth > _DEEPEST_CALL:
            raise ArtifactError(
                f"{self._path}: its functions call one another more than {_DEEPEST_CALL} deep, or without end; use a "
                "file of wsss-export"
            )
        if owner not in self._inlined:
            called = sum(self._size(inner, depth + 1) * count for inner, count in self._calls[owner].items())
            self._inlined[owner] = self._nodes[owner] + called
        return self._inlined[owner]

    def _graph(self, begin: int, end: int) -> None:
        for field, first, last in _fields(self._view, begin, end, _GRAPH):
            if field == _GRAPH_NODE:
                self._node(first, last)
            elif field == _GRAPH_INITIALIZER:
                self._tensor(first, last)
            elif field == _GRAPH_SPARSE:
                self._refuse_sparse()

    def _node(self, begin: int, end: int) -> None:
        operator, domain = (self._text(begin, end, _NODE, number) for number in (_NODE_OP, _NODE_DOMAIN))
        if domain in STANDARD:
            if operator not in OPERATORS:
                raise ArtifactError(
                    f"{self._path}: needs the operator '{operator[:80]}', which is not among those of an export (one "
                    "that repeats or branches could run without end); refused: export it with wsss-export"
                )
        elif (domain, operator) not in self._functions:
            raise ArtifactError(
                f"{self._path}: needs the operator '{domain}::{operator}', which is neither standard nor a function of "
                "the file; export it with wsss-export"
            )
        self._nodes[self._owner] += 1
        if (domain, operator) in self._functions:
            self._calls[self._owner][domain, operator] += 1
        for field, first, last in _fields(self._view, begin, end, _NODE):
            if field == _NODE_ATTRIBUTE:
                self._attribute(first, last)

    def _attribute(self, begin: int, end: int) -> None:
        for field, first, last in _fields(self._view, begin, end, _ATTRIBUTE):
            if field in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                self._tensor(first, last)
            elif field in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                raise ArtifactError(
                    f"{self._path}: holds a graph inside of an operator, which wsss-export never writes; refused: use "
                    "a file of wsss-export"
                )
            elif field in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
                self._refuse_sparse()

    def _refuse_sparse(self) -> None:
        # A few bytes of it stand for any number of elements, which a runtime writes out.
        raise ArtifactError(
            f"{self._path}: holds a sparse tensor, which wsss-export never writes; refused: use a file of wsss-export"
        )

    def _tensor(self, begin: int, end: int) -> None:
        sides: list[int] = []
        kind, raw, strings, name = 0, None, 0, ""
        external: dict[str, str] = {}
        for field, first, last in _fields(self._view, begin, end, _TENSOR):
            if field == _TENSOR_DIMS:
                # One number, or many packed into bytes; both are numbers between the two positions.
                while first < last:
                    value, first = _varint(self._view, first, last)
                    sides.append(value)
            elif field == _TENSOR_TYPE:
                kind = _varint(self._view, first, last)[0] & 0xFFFFFFFF  # as wide as readers take it
            elif field == _TENSOR_RAW:
                raw = last - first
            elif field == _TENSOR_STRING:
                strings += 1
            elif field == _TENSOR_NAME:
                name = bytes(self._view[first:last]).decode()
            elif field == _TENSOR_EXTERNAL:
                key = self._text(first, last, _ENTRY, _ENTRY_KEY)
                if key in external:
                    raise _Malformed(f"a tensor names '{key[:80]}' of its data file twice")
                external[key] = self._text(first, last, _ENTRY, _ENTRY_VALUE)
        count = math.prod(sides)
        declared = (count * _BITS.get(kind, 8) + 7) // 8
        there = strings if kind == _STRING else raw
        if external:
            self._outside(name, external, declared)
        elif declared > len(self._view) or (there is not None and kind in _BITS and there != declared):
            raise ArtifactError(
                f"{self._path}: tensor '{name[:80]}' declares {' x '.join(map(str, sides[:8]))} elements, which the "
                "file has not; it is damaged or hostile: export it again"
            )

    def _outside(self, name: str, external: dict[str, str], declared: int) -> None:
        """Data in another file: it has to lie in the same folder and to be there."""
        location = external.get("location", "")
        relative = PurePosixPath(location)
        folder = self._path.parent.resolve()
        target = folder / location if location and "\0" not in location else folder
        inside = not relative.is_absolute() and not PureWindowsPath(location).drive and ".." not in relative.parts
        # The last is ONNX Runtime's own sign for an address in its memory.
        inside = inside and "\\" not in location and "_ORT_MEM_ADDR_" not in location
        if not inside or target == folder or folder not in target.resolve().parents:
            raise ArtifactError(
                f"{self._path}: tensor '{name[:80]}' asks for data in '{location[:200]}', outside of the model's "
                "folder; refused: use a file of wsss-export, which holds all of its data"
            )
        # Of signs, blanks and underscores, readers make different numbers.
        for key in ("offset", "length"):
            text = external.get(key, "0")
            if not (text.isascii() and text.isdigit()):
                raise _Malformed(f"{key} '{text[:80]}' of a data file is no plain number")
        try:
            offset, length = int(external.get("offset", "0")), int(external.get("length", declared))
            size = target.stat().st_size
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{self._path}: its data file '{location}' cannot be used ({error}); copy both"
            ) from error
        if length < declared or offset + length > size:
            raise ArtifactError(f"{self._path}: its data file '{location}' is cut short ({size} bytes); copy it again")

    def _text(self, begin: int, end: int, fields: _Fields, number: int) -> str:
        """A short text field of a message; empty where there is none."""
        text = ""
        for field, first, last in _fields(self._view, begin, end, fields):  # to its end, where it could come again
            if field == number:
                if last - first > _LONGEST_TEXT:
                    raise _Malformed(f"a name of {last - first} bytes")
                text = bytes(self._view[first:last]).decode()
        return text


def _fields(view: memoryview, begin: int, end: int, known: _Fields) -> Iterator[tuple[int, int, int]]:
    """Known fields of a message between two positions: number, and where its content begins and ends."""
    position, met = begin, set()
    while position < end:
        tag, position = _varint(view, position, end)
        field, wire = tag >> 3, tag & 7
        if field == 0 or tag >> 32:  # readers differ in what they make of larger ones
            raise _Malformed(f"field number {field}")
        if wire == _VARINT:
            first = position
            _, position = _varint(view, position, end)
        elif wire == _BYTES:
            length, first = _varint(view, position, end)
            position = first + length
        elif wire in (_FIXED64, _FIXED32):
            first, position = position, position + (8 if wire == _FIXED64 else 4)
        else:
            raise _Malformed(f"wire type {wire}")
        if position > end:
            raise _Malformed("a part goes beyond its end")
        if field not in known:
            continue
        expected, often = known[field]
        # Of numbers, many may be packed into bytes.
        if wire != expected and not (wire == _BYTES and expected == _VARINT and often):
            raise _Malformed(f"field {field} has wire type {wire}, expected {expected}")
        if field in met and not often:
            raise _Malformed(f"field {field} comes twice")
        met.add(field)
        yield field, first, position


def _varint(view: memoryview, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _Malformed("it ends inside a number")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, position
    raise _Malformed("a number of more than 64 bits")
