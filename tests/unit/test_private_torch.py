"""Private parts of torch that the source uses. If a release loses one, a test names it and the files."""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

PACKAGE = Path(__file__).parents[2] / "src" / "lisatune"

OWNERS: dict[str, Any] = {
    "torch.nn.Module": nn.Module(),
    "torch.optim.Optimizer": torch.optim.SGD([torch.empty(0)]),
    "torch.UntypedStorage": torch.UntypedStorage(0),
    "torch.Tensor": torch.empty(0),
}
"""Objects whose private attributes are told by their name alone."""

KNOWN = {
    "torch.Tensor._indices",
    "torch.Tensor._nnz",
    "torch.Tensor._post_accumulate_grad_hooks",
    "torch.Tensor._values",
    "torch.UntypedStorage._cdata",
    "torch._C",
    "torch._C._current_graph_task_id",
    "torch._dynamo.utils.counters",
    "torch._foreach_add_",
    "torch._fused_adamw_",
    "torch._softmax_backward_data",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._subclasses.fake_tensor.in_kernel_invocation_manager",
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "torch.nn.Module._apply",
    "torch.nn.Module._backward_hooks",
    "torch.nn.Module._backward_pre_hooks",
    "torch.nn.Module._buffers",
    "torch.nn.Module._compiled_call_impl",
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_pre_hooks",
    "torch.nn.Module._load_from_state_dict",
    "torch.nn.Module._non_persistent_buffers_set",
    "torch.nn.Module._parameters",
    "torch.nn.Module._save_to_state_dict",
    "torch.ops.aten._coalesce",
    "torch.ops.aten._index_put_impl",
    "torch.ops.aten._index_put_impl_",
    "torch.ops.aten._local_scalar_dense",
    "torch.ops.aten._to_copy",
    "torch.ops.aten._unsafe_index",
    "torch.ops.aten._unsafe_view",
    "torch.optim.Optimizer._optimizer_step_post_hooks",
    "torch.optim.Optimizer._optimizer_step_pre_hooks",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "torch.utils._pytree.arg_tree_leaves",
    "torch.utils._pytree.tree_leaves",
}
"""Checked on torch 2.13. To use another one, write it here."""


def uses_of(source: str) -> set[str]:
    """Names of torch with a part that begins with an underscore."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            path = ast.unparse(node)
            if path.startswith("torch."):
                found.add(path)
            elif path.startswith("aten."):
                found.add(f"torch.ops.{path}")
            elif not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                owners = [name for name, owner in OWNERS.items() if hasattr(owner, node.attr)]
                found |= {f"{owners[0]}.{node.attr}"} if owners else set()
    return {name for name in found if any(is_private(part) for part in name.split("."))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def resolve(name: str) -> Any:
    """The object of this name; AttributeError where there is none."""
    for owner, value in OWNERS.items():
        if name.startswith(f"{owner}."):
            return getattr(value, name.removeprefix(f"{owner}."))
    value = torch
    path = "torch"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(path)
            except ImportError as error:
                raise AttributeError(path) from error
    return value


USES = {
    str(file.relative_to(PACKAGE)): uses_of(file.read_text(encoding="utf-8"))
    for file in sorted(PACKAGE.rglob("*.py"))
}


def test_uses_are_found() -> None:
    source = "from torch._a import B\nfrom torch.nn import C\ntorch._d(x._nnz(), x._ours)\naten._e.default\n"
    assert uses_of(source) == {"torch._a.B", "torch._d", "torch.Tensor._nnz", "torch.ops.aten._e"}


def test_every_use_is_known() -> None:
    assert set().union(*USES.values()) == KNOWN


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_torch_still_has(name: str) -> None:
    try:
        resolve(name)
    except AttributeError:
        files = [file for file, names in USES.items() if name in names]
        pytest.fail(f"torch {torch.__version__} has no {name}, which is used in {', '.join(files)}")


def test_a_loss_is_seen() -> None:
    for name in ("torch._lost", "torch.Tensor._lost", "torch._subclasses.lost.Lost"):
        with pytest.raises(AttributeError):
            resolve(name)
