"""A device that is not the CPU, on a machine that has none: tensors are marked, moved by marking, and never mixed."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cpu", 1)  # whose tensors have true values; torch itself would take it for the CPU
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)  # takes indices of the CPU on any device
UNMARKED = (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy)


def is_elsewhere(tensor) -> bool:
    return getattr(tensor, "elsewhere", False)


def put_elsewhere(model) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.elsewhere = True


class OtherDevice(TorchFunctionMode):
    """While it lasts, a function of tensors on both devices fails as it would on a GPU, and what it makes is where its inputs are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function == torch.Tensor.device.__get__:
            return DEVICE if is_elsewhere(args[0]) else function(*args)
        elsewhere = any(map(is_elsewhere, given))
        wanted = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
        if wanted:
            elsewhere = wanted[0] == DEVICE
            args, kwargs = tree_map_only(torch.device, lambda device: torch.device("cpu"), (args, kwargs))
        elif function is torch.Tensor.to and len(given) > 1:
            elsewhere = is_elsewhere(args[1])
        elif function not in (*INDEXING, torch.Tensor.copy_):
            places = {is_elsewhere(tensor) for tensor in given if tensor.dim()}
            if len(places) > 1:
                raise RuntimeError(f"{function.__name__}: expected all tensors to be on the same device")
        elif function in INDEXING:
            elsewhere = is_elsewhere(args[0])
        result = function(*args, **kwargs)

        def mark(tensor):
            if any(tensor is other for other in given) and is_elsewhere(tensor) != elsewhere:
                tensor = tensor.view_as(tensor)  # moved: another tensor of the same values
            if elsewhere and function not in UNMARKED:
                tensor.elsewhere = True
            return tensor

        return tree_map_only(torch.Tensor, mark, result)
