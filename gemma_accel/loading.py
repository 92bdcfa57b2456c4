"""How a checkpoint becomes a model without ever holding on the GPU what the GPU cannot hold.

Stock Transformers reserves, up front, room on the GPU for everything that is mapped there: 6.25 GiB
for E2B in 4 bits, 8.60 for E4B, of which the per-layer embedding table (PLE), never quantised, is
4.4 and 5.3. So the table must be out of the model's ``state_dict`` before the loader looks. While
`from_pretrained` builds the (meta) model, the text model's table is taken out; when the resolved
checkpoint files come by, its place in them is noted; once the model is loaded the table is bound to
that place.

Only the classes that `apply` takes are loaded so. Four class attributes on `Gemma4PreTrainedModel`
carry this (`from_pretrained`; the static `_load_pretrained_model`, which receives the resolved
files whatever the revision, subfolder, variant or sharding; `load_adapter`, before which the table
must be bound; and `save_pretrained`, for a model that is saved over the file that its table is read
from); removing them is the undo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.gemma4.modeling_gemma4 import Gemma4PreTrainedModel, Gemma4TextModel

from gemma_accel.errors import GemmaAccelError
from gemma_accel.hostmemory import FileSlice
from gemma_accel.models import SUPPORTED, text_model
from gemma_accel.patches.clipped import prepare_for_peft
from gemma_accel.patches.per_layer import HostPerLayerEmbedding

__all__ = ["find_tensors", "install_load_path"]

_TABLE = "embed_tokens_per_layer"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SEAMS = ("from_pretrained", "_load_pretrained_model", "load_adapter", "save_pretrained")
_MAX_HEADER = 100 << 20  # safetensors' own limit


class _Loads(threading.local):
    """The load in progress in this thread, if any."""

    current: _Load | None = None


_loads = _Loads()
_one_at_a_time = threading.Lock()  # a class's `__init__` is exchanged meanwhile


@dataclasses.dataclass
class _Load:
    """What is known of one `from_pretrained` call's table."""

    source: FileSlice | None = None
    on_cpu: bool = False
    dtype: torch.dtype | None = None


def install_load_path() -> Callable[[], None]:
    """Make Gemma 4's `from_pretrained` leave the PLE table where it is; returns the undo. Twice is
    the same as once.
    """
    if "from_pretrained" in vars(Gemma4PreTrainedModel):
        return lambda: None
    seam: Any = Gemma4PreTrainedModel  # to a type checker a method is nothing to assign to
    stock_from_pretrained = seam.from_pretrained.__func__
    stock_load = seam._load_pretrained_model
    stock_load_adapter = seam.load_adapter
    stock_save = seam.save_pretrained

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        nested = _loads.current is not None
        if nested or is_deepspeed_zero3_enabled() or not issubclass(cls, SUPPORTED):
            return stock_from_pretrained(cls, *args, **kwargs)
        with _one_at_a_time, _table_left_out():
            result = stock_from_pretrained(cls, *args, **kwargs)
            _finish(result[0] if isinstance(result, tuple) else result)
        return result

    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if _loads.current is not None:
            load_config = _locate(model, state_dict, checkpoint_files, load_config, _loads.current)
        return stock_load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    @functools.wraps(stock_load_adapter)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        _finish(self)  # `from_pretrained` of an adapter's directory ends with this
        return stock_load_adapter(self, *args, **kwargs)

    @functools.wraps(stock_save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not (tables := _tables_read_from(self, save_directory)):
            return stock_save(self, save_directory, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with _written_aside(Path(save_directory)) as aside:
            result = stock_save(self, aside, *args, **kwargs)
            saved = [Path(save_directory) / file.name for file in aside.iterdir()]
        _bind_to_saved(self, tables, saved)
        return result

    from_pretrained.__doc__ = stock_from_pretrained.__doc__
    seam.from_pretrained = classmethod(from_pretrained)
    seam._load_pretrained_model = staticmethod(_load_pretrained_model)
    seam.load_adapter = load_adapter
    seam.save_pretrained = save_pretrained

    def undo() -> None:
        for name in _SEAMS:
            if name in vars(Gemma4PreTrainedModel):
                delattr(Gemma4PreTrainedModel, name)

    return undo


@contextlib.contextmanager
def _table_left_out() -> Iterator[None]:
    """While open, text models built in this thread come without their table."""
    seam: Any = Gemma4TextModel
    stock_init = seam.__init__
    load = _loads.current = _Load()

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        if _loads.current is load and getattr(self, _TABLE, None) is not None:
            _take_out(self)

    seam.__init__ = __init__
    try:
        yield
    finally:
        _loads.current = None
        seam.__init__ = stock_init


def _take_out(text: Any) -> None:
    table = getattr(text, _TABLE)
    weight = table._parameters.pop("weight")
    # a plain attribute: not in state_dict, so neither reserved for nor loaded; marked, so not
    # initialised either
    placeholder = weight.detach()
    placeholder._is_hf_initialized = True
    table.__dict__["weight"] = placeholder
    table.__class__ = HostPerLayerEmbedding
    text._keys_to_ignore_on_load_unexpected.add(rf"{_TABLE}\.weight")


def _put_back(table: Any) -> None:
    weight = table.__dict__.pop("weight")
    table.__class__ = table.stock
    table._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=True)


def _tables(model: nn.Module) -> list[tuple[str, HostPerLayerEmbedding]]:
    return [(path, m) for path, m in model.named_modules() if type(m) is HostPerLayerEmbedding]


def _locate(
    model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, load: _Load
) -> Any:
    """Find the table in the checkpoint; where it cannot be left there, let it load as a Parameter
    on the CPU.
    """
    load.dtype = load_config.dtype
    tables = _tables(model)
    if not tables:
        return load_config
    path, table = tables[0]
    if "disk" in (load_config.device_map or {}).values():  # accelerate then asks for every tensor
        _put_back(table)
        return load_config
    if state_dict is None and not getattr(load_config, "disable_mmap", None):
        load.source = _find_table(checkpoint_files or [], tuple(table.weight.shape))
    if load.source is not None:
        _warn_of_float32(load)
        return load_config
    load.on_cpu = True
    _put_back(table)
    if load_config.device_map is None:
        return load_config
    return dataclasses.replace(load_config, device_map={**load_config.device_map, path: "cpu"})


def _finish(model: Any) -> None:
    """The load in progress, if any, is over: give the model its table."""
    load, _loads.current = _loads.current, None
    if load is None:
        return
    prepare_for_peft(model)  # PEFT wraps it before a Trainer, and so `apply`, comes by
    table = getattr(text_model(model), _TABLE, None)
    if table is None:
        return
    if load.source is not None:
        table.__dict__.pop("weight", None)
        table._output_dtype = load.dtype or load.source.dtype
        table.bind(load.source, requires_grad=True)
    elif load.on_cpu:
        weight = table._parameters["weight"]
        # with no device map the whole model is on the CPU, and stock moves it later
        if weight.device.type == "cpu":
            table._parameters["weight"] = None
            table.__class__ = HostPerLayerEmbedding
            table._output_dtype = weight.dtype
            table.bind(weight.detach(), requires_grad=True)
    elif type(table) is HostPerLayerEmbedding:
        raise GemmaAccelError(
            "the per-layer embedding table was left out of the model but its place in the "
            "checkpoint never came by (a distributed checkpoint?). Convert the checkpoint to "
            "safetensors, or set GEMMA_ACCEL_DISABLE=1 to load it the stock way."
        )


# -- saving over the file that is in use ----------------------------------------------------------


def _tables_read_from(model: Any, directory: Any) -> list[HostPerLayerEmbedding]:
    """The model's tables whose file is one of ``directory``'s, under whatever name."""
    sources = {}
    for _, table in _tables(model):
        if table.host is not None and isinstance(table.host.source, FileSlice):
            sources[table] = table.host.source.identity[:2]
    if not sources or not os.path.isdir(directory):
        return []
    files = [os.stat(entry) for entry in os.scandir(directory) if entry.is_file()]
    there = {(file.st_dev, file.st_ino) for file in files}
    return [table for table, file in sources.items() if file in there]


@contextlib.contextmanager
def _written_aside(directory: Path) -> Iterator[Path]:
    """A directory inside ``directory`` whose files take their places there at the end. If the body
    raises, everything is as it was: the file in use is neither cut short nor half written.
    """
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        yield aside
        outdated = _outdated_weights(directory, aside)
        for file in list(aside.iterdir()):
            os.replace(file, directory / file.name)
        for file in outdated:
            file.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _outdated_weights(directory: Path, saved: Path) -> list[Path]:
    """Weights of an earlier save in other shards, which stock would delete or a loader prefer."""
    new = {file.name for file in saved.iterdir()}
    pattern = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    if not any(map(pattern.fullmatch, new)):
        return []
    return [f for f in directory.iterdir() if pattern.fullmatch(f.name) and f.name not in new]


def _bind_to_saved(model: Any, tables: list[HostPerLayerEmbedding], saved: list[Path]) -> None:
    """Read the tables from what was just saved, where it took their own file's place."""
    files = sorted(str(file) for file in saved if file.suffix == ".safetensors")
    for table in tables:
        source = _find_table(files, tuple(table.weight.shape))
        if source is not None and table.host is not None:
            table.host.close()
            table.bind(source, requires_grad=table.weight.requires_grad)
    for layer in text_model(model).layers:
        if (graphs := vars(layer).get("graphs")) is not None:
            graphs.drop()  # they hold the old file's address


def _find_table(files: list[str], shape: tuple[int, ...]) -> FileSlice | None:
    if not all(str(file).endswith(".safetensors") for file in files):
        return None
    found = [place for file in files for place in find_tensors(file, suffix=f"{_TABLE}.weight")]
    # of several (a teacher's beside it, say) Transformers knows which is the model's
    fits = len(found) == 1 and (found[0].rows, found[0].columns) == shape
    return found[0] if fits else None


def find_tensors(file: str | Path, *, suffix: str) -> list[FileSlice]:
    """Where the two-dimensional tensors whose names end in ``suffix`` lie in a safetensors file.

    Nothing but the header is read, and every number in it is checked against the file's size before
    it is believed.

    Raises:
        ValueError: the header is not one, or places the tensor outside the file.
    """
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"{file}: not a safetensors file (header of {length} bytes in {size})")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:  # the latter: nested a thousand deep
            raise ValueError(
                f"{file}: not a safetensors file (its header is not JSON: {error})"
            ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{file}: not a safetensors file (its header is not an object)")
    found = []
    for name, entry in header.items():
        if name == "__metadata__" or not name.endswith(suffix):
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
            sound = len(shape) == 2 and all(type(n) is int and n >= 0 for n in numbers)
            known = dtype in _DTYPES
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: the header's entry for {name!r} is malformed: {entry!r}"
            ) from error
        if not known or len(shape) != 2:
            continue
        nbytes = math.prod(shape) * _DTYPES[dtype].itemsize if sound else -1
        if not sound or end - begin != nbytes or 8 + length + end > size:
            raise ValueError(
                f"{file}: the header places {name!r} ({dtype} {shape}) at bytes {begin} to {end} "
                f"of {size - 8 - length}, "
                "which cannot be. The file is damaged or was cut short: download it again."
            )
        begins = 8 + length + begin
        found.append(FileSlice.of(file, begins, (shape[0], shape[1]), _DTYPES[dtype]))
    return found


def _warn_of_float32(load: _Load) -> None:
    if load.dtype is torch.float32 and load.source is not None and load.source.dtype.itemsize == 2:
        warnings.warn(
            f"the checkpoint is {str(load.source.dtype).removeprefix('torch.')}, but it is being "
            "loaded in float32, which is what TRL does with a "
            "model given by name: everything that is not quantised takes twice the memory. Give "
            "the trainer "
            'SFTConfig(model_init_kwargs={"dtype": "bfloat16"}).',
            UserWarning,
            stacklevel=2,
        )
