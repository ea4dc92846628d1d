"""Parameters handed out use by use: what training on GPUs spares of small kernels.

A parameter gets a gradient from every use, which autograd casts and adds one by one: two kernels for each. Within
``ParameterUses`` every use is a leaf of its own, and a few fused kernels cast and add the gradients of all. Narrow
products read copies that one such kernel makes of all parameters, where ``linear`` in PyTorch would cast them at every
use. The numbers are the same to the bit where these ops alone use a parameter; other uses are added last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter: the ParameterUses that hands it out


class ParameterUses:
    """Hands out parameters while it is entered. Only ``gradients`` then sees all of their gradients.

    Args:
        parameters: on one device.
        dtype: of copies for ``linear``, which reads them where its input is of this dtype; None: none.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype | None) -> None:
        self.parameters = list(parameters)
        self._copied = [parameter for parameter in self.parameters if dtype not in (None, parameter.dtype)]
        self._copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter: its copy, and the version copied
        for parameter in self._copied:
            self._copies[parameter] = torch.empty_like(parameter, dtype=dtype), -1
        # The parameter, the leaf, and where in the parameter it begins if it is a view.
        self._uses: list[tuple[Tensor, Tensor, int | None]] = []

    def __enter__(self) -> ParameterUses:
        self.refresh()
        for parameter in self.parameters:
            _owners[parameter] = self
        return self

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            _owners.pop(parameter, None)
        self._uses.clear()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the parameters as they are now; whatever was computed from earlier copies has had its backward."""
        if not self._copied:
            return
        copies = [self._copies[parameter][0] for parameter in self._copied]
        torch._foreach_copy_(copies, self._copied)
        for parameter, copy in zip(self._copied, copies, strict=True):
            self._copies[parameter] = copy, parameter._version

    def use(self, parameter: Tensor, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor``, which is ``parameter`` or a view of it, in ``dtype``: a new leaf where it takes a gradient."""
        source = parameter
        if dtype != parameter.dtype:
            source, version = self._copies.get(parameter, (parameter, None))
            if source.dtype != dtype or version != parameter._version:  # no copy, or the parameter has changed since
                return tensor.to(dtype)
        offset = None if tensor is parameter else int(tensor.storage_offset() - parameter.storage_offset())
        view = _same_view(source.detach(), tensor, offset)
        if tensor.requires_grad and torch.is_grad_enabled():
            self._uses.append((parameter, view.requires_grad_(), offset))
        return view

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """``torch.autograd.grad(loss, parameters)``, summed over all uses.

        Raises:
            RuntimeError: the loss does not depend on one of them.
        """
        places = {id(parameter): place for place, parameter in enumerate(parameters)}
        uses = [use for use in self._uses if id(use[0]) in places]
        found = torch.autograd.grad(loss, [*(leaf for _, leaf, _ in uses), *parameters], allow_unused=True)
        self._uses.clear()  # also those of what was computed again for the backward
        totals = [torch.empty_like(parameter) for parameter in parameters]
        summands: list[list[tuple[Tensor, Tensor]]] = [[] for _ in totals]  # of each total: its part, and what to add
        for (parameter, leaf, offset), gradient in reversed(list(zip(uses, found, strict=False))):  # as autograd adds
            place = places[id(parameter)]
            if gradient is not None:
                summands[place].append((_same_view(totals[place], leaf, offset), gradient))
        for total, of_total, gradient in zip(totals, summands, found[len(uses) :], strict=True):
            if gradient is not None:  # of uses outside our ops
                of_total.append((total, gradient))
            if not of_total:
                raise RuntimeError(f"the loss does not depend on a parameter of shape {list(total.shape)}")
        with torch.no_grad():
            torch._foreach_zero_(totals)
            for nth in zip_longest(*_widened(summands)):
                parts, gradients = zip(*filter(None, nth), strict=True)
                fused("add_", parts, gradients)
        return totals


def use(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor.to(dtype)``; within ``ParameterUses`` by its way where it is a parameter or a view of one."""
    dtype = tensor.dtype if dtype is None else dtype
    if torch.compiler.is_compiling() or not _owners:  # a compiled function casts and adds by itself
        return tensor.to(dtype)
    parameter = tensor if tensor._base is None else tensor._base
    owner = _owners.get(parameter)
    return tensor.to(dtype) if owner is None else owner.use(parameter, tensor, dtype)


def fused(operation: Literal["copy_", "add_"], places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies or adds each value to its place: on GPUs by a few kernels for all that are laid out alike."""
    pairs = list(zip(places, values, strict=True))
    alike = [pair for pair in pairs if pair[0].stride() == pair[1].stride()]
    if alike:
        getattr(torch, f"_foreach_{operation}")([place for place, _ in alike], [value for _, value in alike])
    for place, value in pairs:
        if place.stride() != value.stride():
            getattr(place, operation)(value)


def _same_view(whole: Tensor, like: Tensor, offset: int | None) -> Tensor:
    """The view of ``whole`` that ``like`` is of its parameter, which is laid out as ``whole``; all of it for None."""
    return whole if offset is None else whole.as_strided(like.shape, like.stride(), whole.storage_offset() + offset)


def _widened(summands: list[list[tuple[Tensor, Tensor]]]) -> list[list[tuple[Tensor, Tensor]]]:
    """The same with what is to be added in the dtype of its total."""
    narrow = [pair for pairs in summands for pair in pairs if pair[0].dtype != pair[1].dtype]
    if not narrow:
        return summands
    wide = [torch.empty_like(gradient, dtype=part.dtype) for part, gradient in narrow]
    torch._foreach_copy_(wide, [gradient for _, gradient in narrow])
    ready = iter(wide)
    return [[(p, g if p.dtype == g.dtype else next(ready)) for p, g in pairs] for pairs in summands]
