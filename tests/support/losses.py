"""A loss and its gradients against the reference."""

from collections.abc import Callable

import torch

from mmlm_fast import testing


def assert_loss_close(fast: Callable, reference: Callable, draw: Callable[[], tuple], draws: int = 4) -> None:
    """Value and gradients by the accuracy rule, over several draws together: the error of one number is luck."""

    def all_draws(f: Callable, *inputs: tuple) -> list[torch.Tensor]:
        found = []
        for args in inputs:
            values = f(*args)
            found.append([values, *testing.gradients(f, args, torch.full_like(values, 0.7))])
        return [torch.stack(same) for same in zip(*found, strict=True)]

    inputs = [draw() for _ in range(draws)]
    testing.assert_close_to_reference(all_draws(fast, *inputs), lambda *args: all_draws(reference, *args), *inputs)
