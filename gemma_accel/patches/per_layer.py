"""Per-layer embeddings (PLE): the table off the GPU, and each layer fetching its own part when it
runs.

Stock looks up ``[tokens, layers * 256]`` rows at once, projects the context to the same shape,
norms it in float32, adds and scales: three tensors of that size live at a time, and a table of 4.4
GiB (E2B) sits in GPU memory for 17.5 KiB a token. Here the text model hands its layers a
`LayerInput` that knows the token ids and the embeddings. A layer gathers its own 256 columns of the
rows, straight from host memory where the table lives there, projects with its own 256 rows of
``per_layer_model_projection``, and does norm, sum, gate and product in one kernel. No tensor with a
layer axis exists.

The table leaves the GPU only where it cannot be trained, which is known once a Trainer is built or
PEFT has wrapped the model: `settle_table` is called at that moment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4TextDecoderLayer,
    Gemma4TextModel,
    Gemma4TextScaledWordEmbedding,
)

from gemma_accel.hostmemory import FileSlice, HostTable, Rows, StaleFileError, host_empty
from gemma_accel.kernels.ple import gather_rows, ple_gate
from gemma_accel.patches.dtypes import why_not_dtype
from gemma_accel.patches.norms import are_norms
from gemma_accel.patches.projections import as_projection, project_rows, rows_apart
from gemma_accel.patches.seams import ClassSwap, Fused, is_watched

__all__ = [
    "FusedGemma4TextModel",
    "HostPerLayerEmbedding",
    "LayerInput",
    "PerLayerInputs",
    "per_layer_patch",
    "bring_table_back",
    "settle_table",
]


_plain_data: Any = vars(torch._C.TensorBase)["data"]


class _TableWeight(nn.Parameter):
    """The table as a Parameter, in which a write through ``.data`` shows.

    PEFT merges that way, and so are new tokens' rows often initialised: ``_version`` does not count
    it on an ordinary one. It pickles as an ordinary one.
    """

    def _set(self, value: Tensor) -> None:
        _plain_data.__set__(self, value)

    data: Any = property(Tensor.detach, _set)  # detached, it shares the version


class HostPerLayerEmbedding(Fused, Gemma4TextScaledWordEmbedding):
    """The PLE table, kept in host memory whatever device the model is on.

    ``weight`` is an ordinary CPU Parameter (of the checkpoint's own pages, where it was loaded from
    a file), so freezing by name, ``state_dict`` and ``save_pretrained`` find it where they expect
    it. Only `.to()` passes it by.
    """

    host: HostTable | None = None  # None while a checkpoint is being loaded
    _bound: tuple[int, int]
    _output_dtype: torch.dtype

    def bind(self, source: FileSlice | Tensor, *, requires_grad: bool) -> None:
        """Take the table from ``source``, a checkpoint's slice or a CPU tensor [rows, columns]."""
        self.host = HostTable(source)
        weight = _TableWeight(self.host.tensor(), requires_grad=requires_grad)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers: do not initialise it
        self._parameters["weight"] = weight
        self._bound = (weight.data_ptr(), weight._version)
        self._output_dtype = getattr(self, "_output_dtype", weight.dtype)
        self._is_hf_initialized = True

    def fetch(self, ids: Tensor) -> Rows:
        """The rows of ``ids``; their columns are read when a layer asks."""
        return self._table().fetch(ids)

    def _table(self) -> HostTable:
        """What is the table now: where somebody wrote into the parameter or gave it other data (a
        resized vocabulary, a strict load), that.
        """
        assert self.host is not None
        if not self._is_as_bound():
            self.host.close()
            self.bind(self.weight.detach(), requires_grad=self.weight.requires_grad)
        return self.host

    def _is_as_bound(self) -> bool:
        return (self.weight.data_ptr(), self.weight._version) == self._bound

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.fetch(input_ids).columns(0, self.embedding_dim).to(self._output_dtype)
        scaled = rows * self.embed_scale.to(input_ids.device, self._output_dtype)
        return _NoGradient.apply(scaled, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> HostPerLayerEmbedding:
        # `.to(device)` leaves the table where it is; `.half()` and `.to(dtype)` change what comes
        # out of it
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        if self._parameters.get("weight") is not None:
            converted = fn(torch.empty(0, dtype=self._output_dtype, device=self.embed_scale.device))
            if converted.is_floating_point():
                self._output_dtype = converted.dtype
            if converted.is_meta:  # so a model is let go of: nothing is left, here as elsewhere
                empty = torch.empty_like(self.weight, dtype=self._output_dtype, device="meta")
                self.weight = nn.Parameter(empty, requires_grad=self.weight.requires_grad)
                _become_stock(self)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # PEFT, which asks for everything and keeps the adapters, asks under a prefix of its own
        for_adapters = prefix.startswith("base_model.")
        if self.host is not None:
            # before its pages are copied into somebody's checkpoint
            self._table().check(name_too=not for_adapters)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.host is not None and not keep_vars and not for_adapters:
            destination[prefix + "weight"] = self._as_it_comes_out()

    def __getstate__(self) -> dict[str, Any]:
        """A pickle holds the table itself, as a stock one does: neither file nor locked memory."""
        self._table().check(name_too=False)
        own = ("host", "_bound", "_output_dtype")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        weight = nn.Parameter(self._as_it_comes_out(), requires_grad=self.weight.requires_grad)
        return {**state, "_parameters": {"weight": weight}}

    def _as_it_comes_out(self) -> Tensor:
        """What stock would hold; a copy only where that is another dtype than the file's."""
        return self.weight.detach().to(self._output_dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "weight")
        if self.host is not None and given is not None and given.shape == self.weight.shape:
            # another table: keep it beside the file rather than write into the file's pages. One
            # that is equal (a frozen table comes back so with every checkpoint) stays in the file
            if given.data_ptr() != self.weight.data_ptr() and not self._equals(given):
                self.host.close()
                self.bind(
                    given.detach().to("cpu", copy=True), requires_grad=self.weight.requires_grad
                )
            state_dict = {
                key: value for key, value in state_dict.items() if key != prefix + "weight"
            }
            state_dict[prefix + "weight"] = self.weight
            as_bound = self._is_as_bound()
            super()._load_from_state_dict(state_dict, prefix, *args)
            if as_bound:  # loading it into itself counted as a write and changed nothing
                self._bound = (self.weight.data_ptr(), self.weight._version)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _equals(self, given: Tensor) -> bool:
        if given.device != self.weight.device:
            return False
        dtype = self._output_dtype
        parts = zip(given.split(8192), self.weight.detach().split(8192), strict=True)
        return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostPerLayerEmbedding:
        """A copy reads the same file, where the table is one's; what is written to either is not
        the other's.
        """
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        shared = {k: v for k, v in self.__dict__.items() if k not in ("_parameters", "_buffers")}
        twin.__dict__.update(shared)
        twin._buffers = {k: None if v is None else v.clone() for k, v in self._buffers.items()}
        twin._parameters = {"weight": None}
        source = self._table().source
        try:
            own = source if isinstance(source, FileSlice) else source.clone()
            twin.bind(own, requires_grad=self.weight.requires_grad)
        except StaleFileError:  # deleted, but open here
            twin.bind(self.weight.detach().clone(), requires_grad=self.weight.requires_grad)
        memo[id(self.weight)] = twin.weight
        return twin


class _NoGradient(torch.autograd.Function):
    """Rows of a table that is out of reach of the gradient that is asked of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the per-layer embedding table would be trained, but it was left in the checkpoint "
            "file, where it has no gradient. Train through transformers.Trainer or a TRL trainer "
            "(they bring it back before the optimizer exists), or freeze it: "
            "model.get_per_layer_input_embeddings().requires_grad_(False)."
        )


class LayerInput:
    """One layer's per-layer input, [B, T, P], computed when the layer asks for it."""

    def __init__(self, inputs: PerLayerInputs, layer: int) -> None:
        self._inputs, self._layer = inputs, layer

    def gated(self, gate: Tensor) -> Tensor:
        """``gelu(gate) * per_layer_input`` for ``gate`` [B, T, P]."""
        inputs = self._inputs
        model, width = inputs.model, inputs.width
        start = self._layer * width
        rows = inputs.rows(start, width)
        projection = inputs.projection(start, width)
        return ple_gate(
            gate,
            projection,
            rows if rows.dtype == gate.dtype else rows.to(gate.dtype),
            model.per_layer_projection_norm.weight,
            eps=model.per_layer_projection_norm.eps,
            projection_scale=model.per_layer_model_projection_scale,
            rows_scale=inputs.rows_scale,
            input_scale=model.per_layer_input_scale,
        )

    def reads(self, embeds: Tensor) -> bool:
        """Whether these embeddings are what it is made from, and so stay as long as it does."""
        return self._inputs._embeds is embeds

    def graph_ids(self) -> Tensor | str:
        """The token ids, where the input can be made again from them and the embeddings alone, on
        the device; otherwise the reason.
        """
        rows, table = self._inputs._rows, self._inputs.model.embed_tokens_per_layer
        if not isinstance(rows, Rows):
            return "the per-layer table is trained, PEFT's, or watched"
        if self._inputs._whole_projection is not None:
            linear = self._inputs.model.per_layer_model_projection
            why = as_projection(linear, self._inputs._embeds)
            why = why if isinstance(why, str) else "it is trained"
            return f"the context projection is stock's ({why})"
        if isinstance(rows, _ResidentRows):
            return rows.ids
        if rows.read is not None or type(table) is not HostPerLayerEmbedding:
            return "the CPU reads the per-layer table's rows"
        return rows.ids

    def tensor(self) -> Tensor:
        """The input itself, by stock's arithmetic, for a layer that is not fused."""
        inputs = self._inputs
        model, width = inputs.model, inputs.width
        start = self._layer * width
        projection = inputs.projection(start, width) * model.per_layer_model_projection_scale
        rows = inputs.rows(start, width).to(projection.dtype) * inputs.rows_scale
        return (model.per_layer_projection_norm(projection) + rows) * model.per_layer_input_scale


class PerLayerInputs:
    """Stands where stock has ``[B, T, layers, P]``: indexed the same way, it gives a layer its
    `LayerInput`.
    """

    def __init__(
        self,
        model: FusedGemma4TextModel,
        rows: Rows | Tensor,
        rows_scale: float,
        embeds: Tensor | None = None,
    ) -> None:
        self.model, self._rows, self.rows_scale, self._embeds = model, rows, rows_scale, embeds
        self.width = model.hidden_size_per_layer_input
        self._whole_projection: Tensor | None = (
            None  # where its rows cannot be had a layer at a time
        )

    def with_embeds(self, embeds: Tensor) -> PerLayerInputs:
        inputs = PerLayerInputs(self.model, self._rows, self.rows_scale, embeds)
        linear = self.model.per_layer_model_projection
        if not rows_apart(linear, embeds):
            inputs._whole_projection = linear(embeds)
        return inputs

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        batch, tokens, layer, _ = index
        if isinstance(layer, int):
            item = LayerInput(self, layer)
            fused = getattr(type(self.model.layers[layer]), "stock", None) is Gemma4TextDecoderLayer
            return item if fused else item.tensor()
        # stock 5.23 drops the tokens that `logits_to_keep` does not ask for: the same slice of what
        # the layers will read
        sliced = PerLayerInputs(self.model, self._rows[batch, tokens], self.rows_scale)
        for name in ("_embeds", "_whole_projection"):
            if (tensor := getattr(self, name)) is not None:
                setattr(sliced, name, tensor[batch, tokens])
        return sliced

    def rows(self, start: int, width: int) -> Tensor:
        """Columns of the table's rows, unscaled, [B, T, width]."""
        if isinstance(self._rows, Rows):
            return self._rows.columns(start, width)
        return self._rows[..., start : start + width]

    def projection(self, start: int, width: int) -> Tensor:
        """The same rows of the context projection, unscaled, [B, T, width]."""
        if self._whole_projection is not None:
            return self._whole_projection[..., start : start + width]
        assert self._embeds is not None
        return project_rows(
            self.model.per_layer_model_projection, self._embeds, start, start + width
        )


class _ResidentRows(Rows):
    """Rows of a frozen table that lives on the model's device."""

    def __init__(self, weight: Tensor, ids: Tensor) -> None:
        self.weight, self.ids = weight, ids

    def __getitem__(self, index: tuple[slice, ...]) -> _ResidentRows:
        return _ResidentRows(self.weight, self.ids[index])

    def columns(self, start: int, width: int) -> Tensor:
        return gather_rows(self.weight, self.ids, start, width)


class FusedGemma4TextModel(Fused, Gemma4TextModel):
    """Hands its layers what they need to make their own per-layer inputs. Its forward is
    stock's.
    """

    def get_per_layer_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Any:
        table = self.embed_tokens_per_layer
        if input_ids is None or not are_norms(self.per_layer_projection_norm):
            return super().get_per_layer_inputs(input_ids, inputs_embeds)
        read = type(table) in (Gemma4TextScaledWordEmbedding, HostPerLayerEmbedding)
        read = read and not is_watched(table) and why_not_dtype(table.weight) is None
        if not read or (table.weight.requires_grad and torch.is_grad_enabled()):
            # trained, wrapped by PEFT, or watched: its own forward, whole rows, with a gradient;
            # they come scaled
            return PerLayerInputs(self, table(input_ids), 1.0)
        if type(table) is HostPerLayerEmbedding:
            return PerLayerInputs(self, table.fetch(input_ids), table.scalar_embed_scale)
        return PerLayerInputs(
            self, _ResidentRows(table.weight, input_ids), table.scalar_embed_scale
        )

    def project_per_layer_inputs(self, inputs_embeds: Tensor, per_layer_inputs: Any = None) -> Any:
        if isinstance(per_layer_inputs, PerLayerInputs):
            return per_layer_inputs.with_embeds(inputs_embeds)
        return super().project_per_layer_inputs(inputs_embeds, per_layer_inputs)


def _why_not(model: Gemma4TextModel) -> str | None:
    if not model.hidden_size_per_layer_input:
        return "the model has no per-layer embeddings"
    return why_not_dtype(model.embed_tokens_per_layer.weight)


per_layer_patch = ClassSwap("per_layer_embeddings", "text", FusedGemma4TextModel, _why_not)


def settle_table(model: Gemma4TextModel, device: torch.device) -> str:
    """Put the table where it belongs, now that it is known whether it is trained; returns what was
    done, for the report.

    Trained: a stock Parameter on the embedding's device. Frozen: host memory, if ``device`` is a
    GPU.
    """
    table = model.embed_tokens_per_layer
    wrapped = getattr(table, "modules_to_save", None)
    candidates = list(wrapped.values()) if wrapped is not None else [table]
    trained = [copy for copy in candidates if copy.weight.requires_grad]
    for copy in trained:
        if isinstance(copy, HostPerLayerEmbedding):
            _bring_back(copy, model.embed_tokens.weight.device)
    if trained:
        return f"trained: a Parameter on {trained[0].weight.device}"
    original = getattr(table, "original_module", table)
    if (
        device.type == "cuda"
        and type(original) is Gemma4TextScaledWordEmbedding
        and wrapped is None
    ):
        _send_away(original)
    if isinstance(original, HostPerLayerEmbedding):
        host = original.host
        assert host is not None
        host.prepare(device)
        where = "the checkpoint file" if isinstance(host.source, FileSlice) else "host memory"
        if device.type != "cuda":
            return f"frozen: read from {where}"
        return f"frozen: in {where}, way {host.way!r} ({host.why})"
    return f"frozen: on {original.weight.device}"


def bring_table_back(model: Gemma4TextModel, device: torch.device | None) -> None:
    """A table in host memory becomes a stock Parameter again, on ``device``.

    None: on the CPU where it was loaded from a file, else where the model's embedding is.
    """
    for table in [m for m in model.modules() if isinstance(m, HostPerLayerEmbedding)]:
        if table.host is None:  # a checkpoint is being loaded
            continue
        from_file = isinstance(table.host.source, FileSlice)
        home = torch.device("cpu") if from_file else model.embed_tokens.weight.device
        _bring_back(table, device or home)


def _bring_back(table: Any, device: torch.device) -> None:
    table._table().check()  # reading pages of a file that was cut short would end the process
    weight = torch.empty(table.weight.shape, dtype=table._output_dtype, device=device)
    weight.copy_(table.weight.detach())
    table.weight.data = weight  # the same Parameter: an optimizer may have it already
    _become_stock(table)


def _become_stock(table: Any) -> None:
    """Its weight is a Parameter of its own by now."""
    table.host.close()
    for name in ("host", "_bound", "_output_dtype"):
        table.__dict__.pop(name, None)
    table.__class__ = table.stock


def _send_away(table: Any) -> None:
    weight = table.weight
    requires_grad = weight.requires_grad
    on_cpu = host_empty(tuple(weight.shape), weight.dtype)
    on_cpu.copy_(weight.detach())
    table.__class__ = HostPerLayerEmbedding
    table._parameters["weight"] = None
    table.bind(on_cpu, requires_grad=requires_grad)
