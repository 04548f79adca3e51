"""Shows a layer's kernel slots in place of the weights it was built for."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..pool.memory import SlotMemory
from ..store.layout import RecordLayout
from ..store.manifest import LayerTensor
from ..windows.memory import View, WindowMemory
from .kernel import Template, build_template, refuse_kept
from .method import OffloadedMoEMethod
from .tensors import as_weights, restored


def attach_slots(
    layer: torch.nn.Module,
    method: OffloadedMoEMethod,
    memory: SlotMemory,
    first: int,
    count: int,
    of_layer: Sequence[LayerTensor] = (),
) -> None:
    """Make slots ``first … first + count - 1`` the experts that ``method``'s kernel computes with.

    Args:
        of_layer: what the store has for all experts of the layer together.

    Raises:
        StoreError: the records, or these tensors, are not what this kernel reads.
        UnsupportedError: the kernel keeps a tensor of its own that slots cannot replace.
    """
    rows = tuple(tensor[first : first + count] for tensor in memory.tensors())
    template = build_template(layer, method, memory.layout, of_layer)
    Faces(layer, method, template, memory.layout, [rows], restored(of_layer))


def attach_windows(
    layer: torch.nn.Module,
    method: OffloadedMoEMethod,
    memory: WindowMemory,
    member: int,
    of_layer: Sequence[LayerTensor] = (),
) -> "LayerFaces":
    """Build ``method``'s kernel on the device and let it read windows and stages; the window is shown first.

    Args:
        of_layer: what the store has for all experts of the layer together.

    Raises:
        StoreError: the records, or these tensors, are not what this kernel reads.
        UnsupportedError: the kernel keeps a tensor of its own that slots cannot replace.
    """
    return LayerFaces(layer, method, memory, member, of_layer)


class _Face(NamedTuple):
    """What the layer and its method hold while one view is shown."""

    parameters: dict[str, torch.nn.Parameter]
    buffers: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]
    quant_config: Any


class Faces:
    """One layer with several sets of rows that its kernel can be made to read, one at a time; the first one at first.

    Args:
        rows: per set and component of the layout, uint8 ``[rows, nbytes]``.
        of_layer: tensors of the layer by name, the same whatever is shown.

    Raises:
        UnsupportedError: the kernel keeps a tensor of its own that rows cannot replace.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        method: OffloadedMoEMethod,
        template: Template,
        layout: RecordLayout,
        rows: Sequence[Sequence[torch.Tensor]],
        of_layer: Mapping[str, torch.Tensor],
    ):
        self._layer, self._method, self._holders = layer, method, template.holders
        self._shown = -1
        self._faces: list[_Face] = []
        for number, tensors in enumerate(rows):
            weights = {**as_weights(layout, tensors), **of_layer}
            self._faces.append(self._face(template, weights))
            self.show(number)
            refuse_kept(layer, method.real, template, weights)
        self.show(0)

    def show(self, number: int) -> None:
        """From now on the kernel reads this set of rows. Work that has been enqueued is not affected."""
        if number == self._shown:
            return
        face, self._shown = self._faces[number], number
        self._set_tensors(face)
        for holder, attribute in self._holders:
            setattr(holder, attribute, face.quant_config)

    def _face(self, template: Template, weights: dict[str, torch.Tensor]) -> _Face:
        """Leaves the layer with ``weights``, from which vLLM makes the configuration."""
        layer, face = self._layer, _Face({}, {}, {}, None)
        for first_name, names in template.names.items():
            parameter = torch.nn.Parameter(weights[first_name], requires_grad=False)
            for name in names:
                if name in layer._parameters:
                    face.parameters[name] = parameter
                elif name in layer._buffers:
                    face.buffers[name] = weights[first_name]
                else:
                    face.plain[name] = weights[first_name]
        self._set_tensors(face)
        return face._replace(quant_config=self._method.real.get_fused_moe_quant_config(layer))

    def _set_tensors(self, face: _Face) -> None:
        """Make the tensors of ``face`` the layer's."""
        self._layer._parameters.update(face.parameters)
        self._layer._buffers.update(face.buffers)
        vars(self._layer).update(face.plain)


class LayerFaces(Faces):
    """A layer's window and stages, by ``View``."""

    def __init__(
        self,
        layer: torch.nn.Module,
        method: OffloadedMoEMethod,
        memory: WindowMemory,
        member: int,
        of_layer: Sequence[LayerTensor],
    ):
        rows = [memory.tensors(member, view) for view in memory.views]
        device = rows[View.WINDOW][0].device
        with torch.device(device):
            template = build_template(layer, method, memory.layout, of_layer)
        on_device = {name: tensor.to(device) for name, tensor in restored(of_layer).items()}
        super().__init__(layer, method, template, memory.layout, rows, on_device)
