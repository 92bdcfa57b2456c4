"""Which source each built-in patch was written for, and whether that is what is installed.

A patch does again, by other means, what a class or function of Transformers or PEFT does. Once that
code says something else, the patch would go on computing the old thing, and nothing would raise. So
`SEAMS` names what each patch stands in for or takes for granted, and `KNOWN` the fingerprints of
that source in the versions that the patches were tested with. `apply` asks `why_not` before it
installs a patch; where the source is another one, the modules stay stock and the report says so.
There is no switch to force it. Patches of plugins have no fingerprints and are not asked for any.

A fingerprint is a hash of the syntax tree: of a function, or of all functions in a class body.
Layout, comments, docstrings, annotations and `auto_docstring` do not count. ``ABSENT`` is that of
what a version does not have.

What Transformers' Trainer does is not in the table: its methods are wrapped, not replaced, and what
is taken for granted of them is looked at in each run (`GradientAccumulationCallback`).

For a new version of Transformers or PEFT: run the tests with it, read what changed in the seams
that are named, adapt the patches, run ``python -m gemma_accel.fingerprints`` (or give it the
directory in which other versions lie, an unpacked wheel's), and take over the lines it prints.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["ABSENT", "KNOWN", "SEAMS", "TESTED", "fingerprint", "why_not"]

TESTED = {"transformers": "5.17 to 5.24", "peft": "0.21"}
"""The versions whose fingerprints are in `KNOWN`."""

ABSENT = "absent"

_NORM = ("Gemma4RMSNorm",)
_CLIPPED = ("Gemma4ClippableLinear",)
_ROTARY = ("apply_rotary_pos_emb", "rotate_half")
_LORA = ("Linear.forward", "Linear4bit.forward")

SEAMS: dict[str, tuple[str, ...]] = {
    "rms_norm": _NORM,
    "qk_norm_rope": (
        "Gemma4TextAttention",
        "Gemma4TextRotaryEmbedding",
        "_compute_proportional_rope_parameters",
        *_ROTARY,
        *_NORM,
    ),
    "geglu": ("Gemma4TextMLP",),
    "decoder_layer": ("Gemma4TextDecoderLayer", "GradientCheckpointingLayer", *_NORM),
    "per_layer_embeddings": (
        "Gemma4TextModel.get_per_layer_inputs",
        "Gemma4TextModel.project_per_layer_inputs",
        "Gemma4TextModel.forward",
        "Gemma4TextModel._maybe_slice_kv_shared_inputs",
        "Gemma4TextScaledWordEmbedding",
        *_NORM,
    ),
    "lora": _LORA,
    "attention": (
        "sdpa_attention_forward",
        "create_causal_mask",
        "create_sliding_window_causal_mask",
        "_preprocess_mask_arguments",
        "Gemma4TextModel.forward",
        "Gemma4TextModel._maybe_slice_kv_shared_inputs",
        "Gemma4TextAttention",
    ),
    "checkpointing": ("GradientCheckpointingLayer",),
    "cuda_graphs": ("Gemma4TextModel.forward", "GradientCheckpointingLayer"),
    "lm_head": (
        "Gemma4ForCausalLM.forward",
        "Gemma4ForConditionalGeneration.forward",
        "ForCausalLMLoss",
        "fixed_cross_entropy",
    ),
    "clipped_adapters": _CLIPPED,
    "vision_clipped_linear": _CLIPPED,
    "vision_attention": (
        "Gemma4VisionAttention",
        "Gemma4VisionEncoder",
        "Gemma4VisionRotaryEmbedding",
        "apply_multidimensional_rope",
        *_ROTARY,
        *_NORM,
        *_CLIPPED,
    ),
    "vision_mlp": ("Gemma4VisionMLP", *_CLIPPED),
    "vision_layer": ("Gemma4VisionEncoderLayer", *_NORM),
    "vision_lora": (*_LORA, *_CLIPPED),
    "audio_eager_mask": ("Gemma4AudioModel",),
    "audio_clipped_linear": _CLIPPED,
    "audio_attention": (
        "Gemma4AudioAttention",
        "Gemma4AudioModel",
        "Gemma4AudioRelPositionalEncoding",
        *_CLIPPED,
    ),
    "audio_feed_forward": ("Gemma4AudioFeedForward", *_NORM, *_CLIPPED),
    "audio_light_conv": (
        "Gemma4AudioLightConv1d",
        "Gemma4AudioCausalConv1d",
        *_NORM,
        *_CLIPPED,
    ),
    "audio_layer": ("Gemma4AudioLayer", *_NORM),
    "audio_lora": (*_LORA, *_CLIPPED),
}
"""What each patch stands in for or takes for granted. Names are unique over all of `KNOWN`."""

KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers.models.gemma4.modeling_gemma4": {
        "Gemma4RMSNorm": ("b515d9bd99cb",),
        "Gemma4TextAttention": ("8cffa7cde460", "69d6344e7304", "46f01322e07b"),
        "Gemma4TextRotaryEmbedding": (
            "e754a1741c26",
            "4f47cb2be2bb",
            "72b3316548d9",
            "d0aafb05918a",
        ),
        "apply_rotary_pos_emb": ("e1b136d94970",),
        "rotate_half": ("d13566b44750",),
        "Gemma4TextMLP": ("446ecabe9859", "39eca24c1bfa"),
        "Gemma4TextDecoderLayer": ("7f0d96cda66a", "99e97dc75d43"),
        "Gemma4TextModel.get_per_layer_inputs": ("ccec3ae110e5", "0c0f5463f2e4"),
        "Gemma4TextModel.project_per_layer_inputs": ("c309dd5a3ac5",),
        "Gemma4TextModel.forward": ("72e9b24ebd98", "b3d7b6d4fd8d", "897b64d00e62"),
        "Gemma4TextModel._maybe_slice_kv_shared_inputs": ("absent", "8528f72c0dcc", "f0e0678421b3"),
        "Gemma4TextScaledWordEmbedding": ("890bc88f8ea0",),
        "Gemma4ForCausalLM.forward": (
            "12939aa0a4cd",
            "c42e5ee3dbf0",
            "b33c483003af",
            "3ff04ed5e9a2",
            "ddc3bc9149ca",
        ),
        "Gemma4ForConditionalGeneration.forward": (
            "8d1ba83b239d",
            "71c4308d94d3",
            "45bdf65c1e59",
            "e741cf68e9f2",
            "4e59fe706228",
            "6703588a6122",
        ),
        "Gemma4ClippableLinear": ("cea6bb841bc2",),
        "Gemma4VisionAttention": ("0b02b62010d8", "aa56921782c5"),
        "Gemma4VisionEncoder": ("f00445d89d01",),
        "Gemma4VisionRotaryEmbedding": (
            "86df7e44b5c3",
            "73032e63b648",
            "c17190215549",
            "2d03a6e0325b",
        ),
        "apply_multidimensional_rope": ("9654257f16c8",),
        "Gemma4VisionMLP": ("0858d5ae1d1e",),
        "Gemma4VisionEncoderLayer": ("ea67d19b3b5b", "e1ad9c7ec576"),
        "Gemma4AudioModel": ("1d0e8d7551ac", "dd9e68fc0fdb"),
        "Gemma4AudioAttention": ("8e171a67d484", "56e1c8686b9d"),
        "Gemma4AudioRelPositionalEncoding": ("ec515ef7b307", "1a4e0bb9da12"),
        "Gemma4AudioFeedForward": ("e0694d5f15c0",),
        "Gemma4AudioLightConv1d": ("0007ad6d28c3",),
        "Gemma4AudioCausalConv1d": ("0cf773e674df",),
        "Gemma4AudioLayer": ("03cc6a0a3bd1",),
    },
    "transformers.modeling_layers": {
        "GradientCheckpointingLayer": ("24d19f77ae80", "0c38020056fe", "fdb785aad31c"),
    },
    "transformers.modeling_rope_utils": {
        "_compute_proportional_rope_parameters": ("88500d0476cb", "e395686d4af1"),
    },
    "transformers.masking_utils": {
        "create_causal_mask": ("a688fa88481d", "7af97c4e0893", "f8fdc4a020c1", "3fb067648fe2"),
        "create_sliding_window_causal_mask": (
            "338f368922bc",
            "689999fc2c38",
            "6497adf28df8",
            "37990848193c",
        ),
        "_preprocess_mask_arguments": ("9643cd7dc2ae", "c5a0fa832a50"),
    },
    "transformers.integrations.sdpa_attention": {
        "sdpa_attention_forward": (
            "9ca25aba6080",
            "5bccae01f579",
            "33e413be6ca2",
            "2e8b7a1e01f9",
            "95be3bbfbfe2",
        ),
    },
    "transformers.loss.loss_utils": {
        "ForCausalLMLoss": ("3752db534e73",),
        "fixed_cross_entropy": ("384506491bf7",),
    },
    "peft.tuners.lora.layer": {
        "Linear.forward": ("5cd0508e909e",),
    },
    "peft.tuners.lora.bnb": {
        "Linear4bit.forward": ("e2fdca4a0ad0",),
    },
}
"""Module, name in it, fingerprints, oldest version first."""

_ONLY_WITH = {"peft.tuners.lora.bnb": "bitsandbytes"}
"""What need not be imported where that is not: no layer is of its kind then."""


def why_not(patch: str) -> str | None:
    """Why the built-in patch of that name must not be installed; None where all that it stands in
    for is as it was when the patch was written. Plugins' patches are never refused.
    """
    return next((reason for name in SEAMS.get(patch, ()) if (reason := _changed(name))), None)


def _changed(name: str) -> str | None:
    module = _home(name)
    if (needed := _ONLY_WITH.get(module)) and needed not in sys.modules:
        return None
    package = module.split(".")[0]
    try:
        found = fingerprint(module, name)
    except SourceError as error:
        return f"{name} of {_version(package)} {error}, so it cannot be told whether it changed"
    if found in KNOWN[module][name]:
        return None
    return (
        f"{name} of {_version(package)} is not the source that this patch was written for "
        f"({package} {TESTED[package]}). Install a newer gemma_accel, or such a {package}"
    )


def _home(name: str) -> str:
    return next(module for module, names in KNOWN.items() if name in names)


def _version(package: str) -> str:
    return f"{package} {getattr(sys.modules.get(package), '__version__', '')}".rstrip()


# --- a fingerprint --------------------------------------------------------------------------------


class SourceError(Exception):
    """The source of something cannot be had; says why."""


def fingerprint(module: str, name: str) -> str:
    """The fingerprint of what is there now under that name, a function or class, or `ABSENT`.

    Raises:
        SourceError: somebody outside of its package put a wrapper around it, or Python does not
            have its source.
    """
    thing: Any = importlib.import_module(module)
    for part in name.split("."):
        # not by getattr: what a class inherits is another class's
        thing = vars(thing).get(part, None)
        if thing is None:
            return ABSENT
    members = vars(thing).values() if isinstance(thing, type) else (thing,)
    functions = [f for f in map(_function, members) if f is not None]
    return _hash_of(_of_live(f) for f in functions)


def _function(member: Any) -> Any:
    """The function inside a method, a property or the like; None for anything else."""
    for attribute in ("__func__", "fget", "func"):
        member = getattr(member, attribute, member)
    return member if inspect.isfunction(member) else None


@functools.cache
def _of_live(function: Callable[..., Any]) -> str:
    try:
        inner = inspect.unwrap(function, stop=_is_foreign)
        if _is_foreign(inner):
            raise SourceError(f"was replaced or wrapped by {_module_of(inner)}")
        source = inspect.getsource(inner)  # read, never edited nor run
        (node,) = ast.parse(textwrap.dedent(source)).body
    except (OSError, TypeError, ValueError, SyntaxError) as error:
        raise SourceError("has no source that could be read") from error
    return _plain(node)


def _module_of(function: Any) -> str:
    return str(getattr(function, "__globals__", {}).get("__name__"))


def _is_foreign(function: Any) -> bool:
    """Whether a function is neither of Transformers nor PEFT, nor of what they decorate with."""
    return _module_of(function).split(".")[0] not in ("transformers", "peft", "torch")


def _hash_of(functions: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(sorted(functions)).encode()).hexdigest()[:12]


# what the fields of a syntax tree say of layout, of types and of Python's own version
_LEFT_OUT = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx", "simple"}


def _plain(node: Any) -> str:
    """A syntax tree as text that does not depend on Python's version, without what does not
    count.
    """
    if isinstance(node, list):
        return f"[{','.join(map(_plain, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign(targets=[node.target], value=node.value)
    fields = []
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            value = [item for item in value if not _is_remark(item)]
        if name not in _LEFT_OUT and value is not None and value != []:
            fields.append(f"{name}={_plain(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_remark(node: Any) -> bool:
    """Whether a statement or decorator only says something to readers and type checkers."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    decorator = node.func if isinstance(node, ast.Call) else node
    return isinstance(decorator, ast.Name) and decorator.id == "auto_docstring"


# --- for whoever extends the table ----------------------------------------------------------------


def fingerprint_in(root: Path, module: str, name: str) -> str:
    """The same from the files under ``root``, without importing them."""
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    node: Any = ast.parse(path.read_text())
    for part in name.split("."):
        named = [n for n in _defined(node) if n.name == part]
        if not named:
            return ABSENT
        node = named[-1]
    functions = node.body if isinstance(node, ast.ClassDef) else [node]
    return _hash_of(_plain(f) for f in functions if isinstance(f, ast.FunctionDef))


def _defined(node: Any) -> Iterator[Any]:
    """The functions and classes in a body, under an ``if`` too."""
    for child in node.body:
        if isinstance(child, ast.If):
            yield from _defined(child)
        elif isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield child


def _table(roots: list[Path]) -> Iterator[str]:
    """The lines of `KNOWN` with what is found under ``roots``, or is installed where there are
    none.
    """
    for module, names in KNOWN.items():
        yield f'    "{module}": {{'
        for name, known in names.items():
            found = list(known)
            for root in roots:
                if (root / module.split(".")[0]).is_dir():
                    found.append(fingerprint_in(root, module, name))
            if not roots:
                found.append(fingerprint(module, name))
            listed = "".join(f'"{one}", ' for one in dict.fromkeys(found)).rstrip()
            listed = listed if len(set(found)) == 1 else listed.removesuffix(",")
            new = "" if set(found) == set(known) else "  # new"
            yield f'        "{name}": ({listed}),{new}'
        yield "    },"


if __name__ == "__main__":
    print("\n".join(_table([Path(argument) for argument in sys.argv[1:]])))
