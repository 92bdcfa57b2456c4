"""A large read-only table in host memory that a GPU reads row by row.

Three ways, the first that the machine allows:

``mapped``   the checkpoint file's own pages, mapped shared and read-only and registered with the
             driver. One copy a host whatever the number of processes, nothing copied at load, and a
             kernel reads rows over PCIe.
``pinned``   a copy in page-locked memory of this process, read the same way.
``read``     rows are read by the CPU when they are needed (``preadv`` from the file, or indexed
             from the tensor) and copied.

The first two need the table's size in RAM that stays locked.
"""

from __future__ import annotations

import ctypes
import io
import math
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma_accel.kernels.ple import HostRows, gather_rows

__all__ = ["FileSlice", "HostTable", "Rows", "StaleFileError", "host_empty", "locked_empty"]


class StaleFileError(RuntimeError):
    """The checkpoint file that a table is read from changed on disk while in use."""


@dataclass(frozen=True)
class FileSlice:
    """A row-major tensor inside a file: where it starts and what it is, and which file it was when
    it was opened.
    """

    path: Path
    offset: int
    rows: int
    columns: int
    dtype: torch.dtype
    identity: tuple[int, int, int, int]
    """device, inode, size and modification time in nanoseconds"""

    @classmethod
    def of(
        cls, path: str | Path, offset: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> FileSlice:
        """Describe a tensor of ``shape`` at byte ``offset`` of ``path``.

        Raises:
            ValueError: the tensor reaches past the end of the file.
        """
        path = Path(os.path.realpath(path))
        slice_ = cls(path, offset, *shape, dtype, _identity(path))
        if offset < 0 or offset + slice_.nbytes > slice_.identity[2]:
            raise ValueError(
                f"{path}: a tensor of {shape} {dtype} at byte {offset} reaches past the end of "
                "the file "
                f"({slice_.identity[2]} bytes). The file was cut short: download it again."
            )
        return slice_

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def check(self) -> None:
        """Raise `StaleFileError` if the file is no longer the one that was opened."""
        try:
            now = _identity(self.path)
        except OSError as error:
            raise StaleFileError(
                f"{self.path} is in use by a running model and cannot be read any more "
                f"({error.strerror}). "
                "Restore the file, or load the model again."
            ) from error
        if now != self.identity:
            raise StaleFileError(
                f"{self.path} is in use by a running model and was changed on disk since it was "
                "loaded "
                "(another size, modification time or file). Load the model again; save to another "
                "directory next time."
            )


def _identity(path: Path) -> tuple[int, int, int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class HostTable:
    """``rows x columns`` in host memory, for `gather` from any device.

    Made from a `FileSlice` (the checkpoint's own pages) or from a CPU tensor. How a CUDA device
    will read it is decided at the first gather from that device, since a process that only moves
    the model about needs none of it; `way` and `why` tell.
    """

    def __init__(self, source: FileSlice | Tensor) -> None:
        self.source = source
        self.way = "read"
        self.why = "no GPU has asked yet"
        self._address: int | None = None
        self._registration: _Registration | None = None
        self._pinned: Tensor | None = None
        self._decided = False
        self._told = False
        self._opened: io.FileIO | None = None  # not a bare number, which a copy would close again
        if isinstance(source, FileSlice):
            self._file(source)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, int]:
        if isinstance(self.source, FileSlice):
            return self.source.rows, self.source.columns
        return self.source.shape[0], self.source.shape[1]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def prepare(self, device: torch.device) -> None:
        """Decide how ``device`` reads the table, and lock its memory where it may. Does nothing the
        second time.
        """
        if self._decided or device.type != "cuda":
            return
        self._decided = True
        with torch.cuda.device(device):
            for way in (self._map, self._pin):
                refusal = way()
                if refusal is None:
                    return
                self.why = (
                    refusal
                    if self.way == "read" and self.why.startswith("no GPU")
                    else f"{self.why}; {refusal}"
                )

    def fetch(self, ids: Tensor) -> Rows:
        """The rows of ``ids``, to be read a slice of columns at a time (a layer's) with
        `Rows.columns`.
        """
        self.prepare(ids.device)
        if ids.device.type == "cuda" and self._address is not None:
            return Rows(self, ids, None)
        return Rows(self, ids, self._read(ids))

    def tensor(self) -> Tensor:
        """The table as a CPU tensor. For a file: private pages, so that a stray write never reaches
        the file.
        """
        source = self.source
        if isinstance(source, FileSlice):
            fd = self._file(source)
            self._check_unwritten(source, fd)
            return _private_tensor(source, fd)
        return source

    def check(self, *, name_too: bool = True) -> None:
        """Raise `StaleFileError` if the table's bytes may have changed since it was bound.

        A file that was deleted, or replaced by another of its name, is still open here and as it
        was: that is an error for what is to stand beside the file or take its place, and a warning,
        once, with ``name_too=False``, for what does not hold the table (adapters). A table in this
        process's own memory is unaffected by either.
        """
        source = self.source
        if isinstance(source, Tensor) or (self._pinned is not None and not name_too):
            return
        self._check_unwritten(source, self._file(source))
        try:
            source.check()
        except StaleFileError as error:
            if name_too:
                raise
            if not self._told:
                self._told = True
                warnings.warn(
                    f"{error} What runs here goes on with the file that it opened, which is as it "
                    "was; adapters are saved as ever.",
                    UserWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """Give locked memory and the file back."""
        if self._registration is not None:
            self._registration.close()
        if self._opened is not None:
            self._opened.close()
        self._registration = self._address = self._pinned = self._opened = None
        self._decided = False

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        held = vars(self)
        if (opened := held.get("_opened")) is not None:
            opened.close()
        if held.get("_registration") is not None and not ending():
            self.close()  # the end of the process gives locked memory back anyway

    # -- the three ways --

    def _map(self) -> str | None:
        """Register the file's pages with the driver. Returns the reason where that is not
        possible.
        """
        if not isinstance(self.source, FileSlice):
            return "the table is not in a file"
        if refusal := _why_not_lock(self.nbytes, shared=True):
            return refusal
        fd = self._file(self.source)
        self._check_unwritten(self.source, fd)
        registration = _Registration.of_file(self.source, fd)
        if isinstance(registration, str):
            return registration
        self._take(registration, "mapped", "the GPU reads the checkpoint's own pages")
        return None

    def _pin(self) -> str | None:
        """Copy the table to page-locked memory of this process. Returns the reason where that is
        not possible.
        """
        if refusal := _why_not_lock(self.nbytes, shared=False):
            return refusal
        if isinstance(self.source, Tensor) and hasattr(self.source, "_gemma_accel_pages"):
            copy = self.source
        else:
            try:
                copy = host_empty(self.shape, self.dtype)
            except OSError as error:
                return f"a copy of {self.nbytes / 2**30:.1f} GiB was refused ({error.strerror})"
            copy.copy_(self.tensor())
        # registered rather than allocated pinned: the caching host allocator would round 4.4 GiB up
        # to 8
        registration = _Registration.of_tensor(copy)
        if isinstance(registration, str):
            return registration
        self._pinned = copy
        self._take(registration, "pinned", "the GPU reads a copy in page-locked memory")
        return None

    def _take(self, registration: _Registration, way: str, why: str) -> None:
        self._registration, self._address = registration, registration.device_address
        self.way, self.why = way, why

    def _read(self, ids: Tensor) -> Tensor:
        """Whole rows on the CPU, [*ids.shape, columns]; page-locked where a GPU waits for them."""
        on_cpu = ids.detach().to("cpu")
        shape, pinned = (*ids.shape, self.shape[1]), ids.device.type == "cuda"
        out = torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=pinned)
        if isinstance(self.source, Tensor):
            torch.index_select(self.source, 0, on_cpu.reshape(-1), out=out.view(-1, self.shape[1]))
            return out
        self._pread(on_cpu.reshape(-1).tolist(), out)
        return out

    def _pread(self, ids: list[int], out: Tensor) -> None:
        source = self.source
        assert isinstance(source, FileSlice)
        fd = self._file(source)
        self._check_unwritten(source, fd)
        size = source.row_bytes
        buffer = memoryview((ctypes.c_char * max(out.nbytes, 1)).from_address(out.data_ptr())).cast(
            "B"
        )
        for position, row in enumerate(ids):
            if not 0 <= row < source.rows:
                raise IndexError(
                    f"row {row} of a table with {source.rows} rows: a token id is out of range"
                )
            view = buffer[position * size : (position + 1) * size]
            if os.preadv(fd, [view], source.offset + row * size) != size:
                self._check_unwritten(source, fd)
                raise StaleFileError(f"{source.path} gave fewer bytes than it holds.")

    def _file(self, source: FileSlice) -> int:
        """The table's file, opened when it is bound: what becomes of its name is no matter then."""
        if self._opened is None:
            source.check()
            self._opened = io.FileIO(source.path)
        return self._opened.fileno()

    @staticmethod
    def _check_unwritten(source: FileSlice, fd: int) -> None:
        """Raise `StaleFileError` if somebody wrote into the open file or cut it short."""
        stat = os.fstat(fd)
        if (stat.st_size, stat.st_mtime_ns) == source.identity[2:]:
            return
        what = "cut short" if stat.st_size < source.identity[2] else "written to"
        raise StaleFileError(
            f"{source.path} was {what} while in use by a running model, which cannot go on with "
            "it. Restore the file, load the model again, and resume from the last checkpoint."
        )


@dataclass
class Rows:
    """Rows of a table that were asked for; their bytes move when `columns` is called."""

    table: HostTable
    ids: Tensor
    read: Tensor | None

    def __getitem__(self, index: tuple[slice, ...]) -> Rows:
        """The rows of some of the ids."""
        return Rows(self.table, self.ids[index], None if self.read is None else self.read[index])

    def columns(self, start: int, width: int) -> Tensor:
        """``table[ids, start:start + width]`` on the ids' device, [*ids.shape, width], in the
        table's dtype.
        """
        if self.read is not None:
            part = self.read[..., start : start + width]
            if self.ids.device.type == "cpu":
                return part
            return part.contiguous().pin_memory().to(self.ids.device, non_blocking=True)
        assert self.table._address is not None
        host = HostRows(self.table._address, *self.table.shape, self.table.dtype)
        return gather_rows(host, self.ids, start, width)


def host_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor on memory pages of its own.

    Registered memory must not share a page with anything else: a copy from or to a tensor that is
    partly registered fails.
    """
    count = math.prod(shape)
    pages = mmap.mmap(-1, max(count * dtype.itemsize, 1))
    tensor = (
        torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
        if count
        else torch.empty(shape, dtype=dtype)
    )
    tensor._gemma_accel_pages = pages  # type: ignore[attr-defined]
    return tensor


def locked_empty(nbytes: int) -> Tensor:
    """``nbytes`` of page-locked memory as a uint8 CPU tensor; pageable where locking is refused.

    Locked by registration: PyTorch's own pinned allocator rounds up to a power of two, twice the
    memory at worst.
    """
    global _told_of_pageable
    tensor = host_empty((nbytes,), torch.uint8)
    registration = _Registration.of_tensor(tensor)
    if not isinstance(registration, str):
        registration._keep = None  # the tensor keeps the registration, not the other way round
        weakref.finalize(tensor, registration.close)
    elif not _told_of_pageable:
        _told_of_pageable = True
        warnings.warn(
            f"what is offloaded waits in pageable memory, which copies slower: {registration}",
            UserWarning,
            stacklevel=2,
        )
    return tensor


_told_of_pageable = False


# -- memory and the driver
# ---------------------------------------------------------------------------------------------


def _private_tensor(source: FileSlice, fd: int) -> Tensor:
    start = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
    view = mmap.mmap(
        fd, source.offset + source.nbytes - start, access=mmap.ACCESS_COPY, offset=start
    )
    flat = torch.frombuffer(
        view, dtype=source.dtype, count=source.rows * source.columns, offset=source.offset - start
    )
    return flat.view(source.rows, source.columns)


def _why_not_lock(nbytes: int, *, shared: bool) -> str | None:
    """The reason why ``nbytes`` had better not be locked: less free than that and a margin for the
    rest of the machine.
    """
    available = _available_memory()
    # file pages count as available while they are not locked; a private copy needs as much again on
    # top
    needed = nbytes + (2 << 30)
    if available is not None and available < needed:
        kind = "locked" if shared else "copied to page-locked memory"
        return (
            f"only {available / 2**30:.1f} GiB of RAM are available, {needed / 2**30:.1f} are "
            "wanted "
            f"for the table to be {kind}"
        )
    return None


def _available_memory() -> int | None:
    """Bytes the system could hand out, less what the process's cgroup forbids; None where nobody
    says.
    """
    available = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            left = int(limit) - used + _file_pages()
            available = left if available is None else min(available, left)
    except (OSError, ValueError):
        pass
    return available


def _file_pages() -> int:
    """Bytes of files that the cgroup counts as used, and gives back when they are needed; 0 where
    nobody says.
    """
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        return int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0


class _Registration:
    """Host pages made readable by the GPU (cuMemHostRegister), until closed."""

    # CUDA driver API, cuda.h: CU_MEMHOSTREGISTER_PORTABLE, _DEVICEMAP, _READ_ONLY and the attribute
    # that allows the last
    PORTABLE, DEVICEMAP, READ_ONLY = 0x01, 0x02, 0x08
    READ_ONLY_SUPPORTED = 113

    def __init__(self, host_address: int, device_address: int, keep: object) -> None:
        self.host_address, self.device_address, self._keep = host_address, device_address, keep

    @classmethod
    def of_file(cls, source: FileSlice, fd: int) -> _Registration | str:
        """Map an open file's slice shared and read-only and register it, or say why not."""
        driver = _driver()
        if isinstance(driver, str):
            return driver
        supported = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(
            ctypes.byref(supported), cls.READ_ONLY_SUPPORTED, torch.cuda.current_device()
        )
        if not supported.value:
            return "this GPU or its driver cannot register read-only pages"
        start = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
        length = source.offset + source.nbytes - start
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
        if address in (None, ctypes.c_void_p(-1).value):
            return f"the file cannot be mapped ({os.strerror(ctypes.get_errno())})"
        mapping = _Mapping(libc, address, length)
        flags = cls.PORTABLE | cls.DEVICEMAP | cls.READ_ONLY
        result = cls._register(driver, address, length, flags, mapping)
        if isinstance(result, str):
            mapping.close()
            return result
        result.device_address += source.offset - start
        return result

    @classmethod
    def of_tensor(cls, tensor: Tensor) -> _Registration | str:
        """Register a CPU tensor's memory, or say why not."""
        driver = _driver()
        if isinstance(driver, str):
            return driver
        return cls._register(
            driver, tensor.data_ptr(), tensor.nbytes, cls.PORTABLE | cls.DEVICEMAP, tensor
        )

    @classmethod
    def _register(
        cls, driver: ctypes.CDLL, address: int, length: int, flags: int, keep: object
    ) -> _Registration | str:
        torch.cuda.current_stream().synchronize()  # also makes sure that a context exists
        code = driver.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(length), flags)
        if code:
            return (
                f"page-locking {_amount(length)} was refused ({_error_name(driver, code)}"
                f"{_lock_limit(length)})"
            )
        device_address = ctypes.c_uint64()
        code = driver.cuMemHostGetDevicePointer_v2(
            ctypes.byref(device_address), ctypes.c_void_p(address), 0
        )
        if code:
            driver.cuMemHostUnregister(ctypes.c_void_p(address))
            return f"the GPU has no address for the locked pages ({_error_name(driver, code)})"
        return cls(address, device_address.value, keep)

    def close(self) -> None:
        driver = _driver()
        if not isinstance(driver, str) and self.host_address:
            torch.cuda.synchronize()  # no kernel may still be reading
            driver.cuMemHostUnregister(ctypes.c_void_p(self.host_address))
        self.host_address = 0
        if isinstance(self._keep, _Mapping):
            self._keep.close()
        self._keep = None


class _Mapping:
    def __init__(self, libc: ctypes.CDLL, address: int, length: int) -> None:
        self._libc, self._address, self._length = libc, address, length

    def close(self) -> None:
        if self._address:
            self._libc.munmap(self._address, self._length)
            self._address = 0


def _lock_limit(nbytes: int) -> str:
    """The process's limit on locked memory, for a message, where ``nbytes`` exceed it."""
    try:
        import resource
    except ImportError:  # Windows has none
        return ""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or nbytes <= limit:
        return ""
    return f"; the limit on locked memory is {_amount(limit)}, `ulimit -l` raises it"


def _amount(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 // 10 else f"{nbytes / 2**10:.0f} KiB"


def _driver() -> ctypes.CDLL | str:
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "the CUDA driver's library cannot be opened"


def _error_name(driver: ctypes.CDLL, code: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"
