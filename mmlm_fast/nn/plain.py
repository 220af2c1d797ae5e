from torch import Tensor, nn
from torch.nn.modules import module as _module


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling `module` computes the formula of `cls` on its parameters, and does nothing else.

    Only then may a fusion read its parameters in place of calling it. Adapters wrap it, parametrizations change its
    class, pruning and weight norm hook it, offloading replaces its forward, and quantised or sharded weights are of a
    class of their own.
    """
    return (
        type(module) is cls
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and not _module._has_any_global_hook()
        and all(p is None or type(p) in (Tensor, nn.Parameter) for p in module._parameters.values())
    )
