"""Safe reading and writing of files. Anybody may have written a file, so sizes and shapes are checked before use."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from kvpress_moe.errors import WriteError

if TYPE_CHECKING:  # the commands check their files before torch is imported
    from torch import Tensor, nn

# In memory, parsed JSON takes up to thirty times its size. A parsed safetensors header takes several times its size.
MAX_JSON = 2**20  # bytes of one JSON text
MAX_HEADER = 2**22  # bytes of the header of a safetensors file

_FLOATS = {"F16", "BF16", "F32", "F64"}
_CODES = {"U8", "I16", "I32", "F16"}


def parse_json(text: str) -> Any:
    """
    Parse a JSON text of bounded size.

    Raises
    ------
    ValueError
        If it is not JSON, too long, or nested too deeply.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"JSON of {len(text)} characters, expected at most {MAX_JSON}")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises OSError if there is no such file, and ValueError like :func:`parse_json`."""
    check_is_file(path)
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON + 1).decode())


def check_is_file(path: Path) -> None:
    """Raise OSError unless a path is a regular file. Reading from a pipe could wait for ever."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")


def is_whole(value: Any, low: int = 0) -> bool:
    """Whether a parsed value is a whole number from ``low`` to ``2**31 - 1``."""
    return type(value) is int and low <= value < 2**31


def is_number(value: Any) -> bool:
    """Whether a parsed value is a number that a float can hold. NaN and infinity are not accepted."""
    return type(value) in (int, float) and abs(value) <= 1e300


def is_text(value: Any) -> bool:
    """Whether a parsed value is a text that can be encoded. JSON may contain one half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """
    Open a safetensors file for reading.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If its header is too long, or if safetensors reports an error while the file is open.
    """
    check_is_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes, expected at most {MAX_HEADER}")
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"safetensors says: {str(error)[:200]}") from error


def read_shapes(tensors: Any, codes: bool = False) -> dict[str, tuple[int, ...]]:
    """
    Shapes of all tensors in an open file. The tensors themselves are not read.

    Parameters
    ----------
    tensors : open safetensors file
    codes : bool
        Whether there may be codes too: bytes, whole numbers and half-precision scales, beside tensors of one dtype.

    Raises
    ------
    ValueError
        If there are no tensors, if they do not all have the same floating-point dtype, or if a shape is too large.
    """
    shapes, dtypes = {}, set()
    for name in tensors.keys():  # noqa: SIM118 (no mapping)
        found = tensors.get_slice(name)
        shapes[name] = tuple(found.get_shape())
        dtypes.add(found.get_dtype())
        if math.prod(max(1, size) for size in shapes[name]) >= 2**48:  # a size of 0 would hide the others
            raise ValueError(f"tensor {name[:80]!r} declares shape {shapes[name]}")
    if codes and len(dtypes) > 1:
        dtypes -= _CODES if dtypes - _CODES else _CODES - {"F16"}
    if len(dtypes) != 1 or not dtypes <= _FLOATS:
        raise ValueError(f"tensors of dtypes {sorted(dtypes)}, expected one of {', '.join(sorted(_FLOATS))} for all")
    return shapes


def check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError for the first tensor that is missing, not expected, or of another shape."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(f"tensor {name[:80]!r} has shape {found.get(name)}, expected {expected.get(name)}")


def check_tensor_finite(tensor: Tensor, name: str) -> None:
    """Raise ValueError if a tensor contains NaN or infinity. No memory of the tensor's size is allocated."""
    if tensor.numel() and not all(math.isfinite(end.item()) for end in tensor.aminmax()):
        raise ValueError(f"{name} holds NaN or infinite numbers")


def fill(module: nn.Module, tensors: Any, may_be_nan: str = "hit_rate") -> None:
    """
    Copy the tensors of an open file into a module, one by one.

    Parameters
    ----------
    module : nn.Module
    tensors
        From :func:`open_tensors`.
    may_be_nan : str, default="hit_rate"
        Name of the buffers that may contain NaN, which means that a value is unknown.

    Raises
    ------
    ValueError
        If names or shapes differ from the module's, or if numbers are not finite in the module's dtype.
    """
    state = module.state_dict()
    check_shapes(read_shapes(tensors), {name: tuple(own.shape) for name, own in state.items()})
    for name, own in state.items():
        tensor = tensors.get_tensor(name).to(own.dtype)
        check_tensor_finite(tensor.nan_to_num(0.0, math.inf) if name.rpartition(".")[2] == may_be_nan else tensor, name)
        own.copy_(tensor)


def file_to_write(path: Path) -> Path:
    """
    The file that writing to a path creates or replaces: the path itself, or what it links to.

    Raises
    ------
    OSError
        If something is there that is not a regular file (a directory, a device, a pipe, a socket), or if the path
        cannot be read.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise FileExistsError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file")
    return target


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """
    Let ``write`` fill a temporary file, then rename it to ``path``. A reader never sees half a file.

    The rest is as in :func:`write_together`.
    """
    write_together({path: write})


def write_together(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """
    Write files that belong together. No file is replaced before all of them have been written.

    A symbolic link stays: the file that it points to is replaced. Devices, pipes and sockets are never replaced.

    Raises
    ------
    WriteError
        If space or permission is missing, or if something else than a regular file is in the way. The temporary files
        are removed. The earlier files are intact, unless the message names some that were replaced.
    """
    temporaries: dict[Path, Path] = {}
    targets: dict[Path, Path] = {}
    replaced: list[str] = []
    path = next(iter(writes))
    try:
        for path in writes:
            targets[path] = file_to_write(path)
        for path, write in writes.items():
            target = targets[path]
            descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            temporaries[path] = Path(name)
            os.close(descriptor)
            write(temporaries[path])
            os.chmod(name, 0o644)  # only the owner can read what mkstemp creates
        for path, temporary in temporaries.items():
            os.replace(temporary, targets[path])
            replaced.append(path.name)
    except BaseException as error:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise WriteError(_why_not_written(path, error, replaced, is_in_the_way=path not in targets)) from error
        raise


def _why_not_written(path: Path, error: Exception, replaced: list[str], is_in_the_way: bool) -> str:
    if replaced:  # between two renames
        return (
            f"{path}: cannot be replaced ({error}), but {', '.join(replaced)} beside it was replaced already. These "
            "files do not belong together now. Write them all again."
        )
    if is_in_the_way:
        return (
            f"{path}: cannot be written ({error}), expected a regular file, or a name that is not taken. "
            "What was there before is intact. Choose another name."
        )
    return (
        f"{path}: cannot be written ({error}), expected a directory with free space and write permission. "
        "What was there before is intact. Free some space, or choose another directory."
    )
