"""Fills a policy with the weights of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_intuitor.models.policy import PolicyModel
from megatron_intuitor.models.safetensors_folder import SafetensorsFolder
from megatron_intuitor.models.weight_map import Placement

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_NO_WEIGHTS = ".rotary_emb.inv_freq"
"""Old checkpoints carry this buffer; it follows from the config."""


@torch.no_grad()
def load_hf_weights(model: PolicyModel, path: Path) -> None:
    """Read this rank's slices of a Hugging Face folder's safetensors into ``model``, cast to the model's dtype.

    Padding rows of the vocabulary become zero.  No communication: every rank reads the same headers, so a wrong
    folder is refused everywhere.

    Raises:
        ValueError: Tensors are missing, unknown or of the wrong shape; the message names file and tensor.
    """
    folder = SafetensorsFolder(path)
    everything = model.placements()
    _check_names(folder, everything, model.tied)
    _check_shapes(folder, everything)
    parameters = dict(model.named_parameters())
    for placement in everything:
        if model.stage_of(placement) == model.groups.pipeline_rank:
            _fill(parameters.pop(model.local_name(placement)), placement, folder, model)
    if model.tied and "output_layer.weight" in parameters:
        # The last stage of a pipeline has a copy of the tied embedding of its own.
        embedding = next(p for p in everything if p.names == (_EMBEDDING,))
        _fill(parameters.pop("output_layer.weight"), embedding, folder, model)
    assert not parameters, f"the weight map leaves out {sorted(parameters)}"


def _fill(parameter: Tensor, placement: Placement, folder: SafetensorsFolder, model: PolicyModel) -> None:
    groups = model.groups
    pieces = placement.entry.layout.pieces(parameter.data, model.geometry, groups.tensor_rank, groups.tensor_size)
    if sum(piece.view.numel() for piece in pieces) != parameter.numel():
        parameter.zero_()  # vocabulary padding
    for piece in pieces:
        numbers = folder.read(placement.names[piece.part], piece.dim, piece.start, piece.length)
        piece.view.copy_(numbers.view(piece.view.shape))


def _check_names(folder: SafetensorsFolder, everything: list[Placement], tied: bool) -> None:
    expected = {name for placement in everything for name in placement.names}
    stored = {name for name in folder if not name.endswith(_NO_WEIGHTS)}
    if tied and _HEAD in stored:
        _check_tied_copy(folder)
        stored.remove(_HEAD)
    if missing := sorted(expected - stored):
        raise ValueError(
            f"{folder.path}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are); "
            "the folder is incomplete or config.json belongs to another model"
        )
    if surplus := sorted(stored - expected):
        raise ValueError(
            f"{folder.file(surplus[0])}: tensor {surplus[0]!r} is no weight of this model ({len(surplus)} such "
            "tensors); config.json belongs to another model"
        )


def _check_tied_copy(folder: SafetensorsFolder) -> None:
    """A tied checkpoint may repeat the embedding as a head, but not contradict it."""
    rows = folder.shape(_HEAD)[0]
    same = folder.shape(_HEAD) == folder.shape(_EMBEDDING) if _EMBEDDING in folder else True
    if _EMBEDDING in folder and (
        not same or not torch.equal(folder.read(_HEAD, 0, 0, rows), folder.read(_EMBEDDING, 0, 0, rows))
    ):
        raise ValueError(
            f"{folder.file(_HEAD)}: tensor {_HEAD!r} differs from {_EMBEDDING!r} although config.json says "
            "tie_word_embeddings; set that to false"
        )


def _check_shapes(folder: SafetensorsFolder, everything: list[Placement]) -> None:
    for placement in everything:
        for name, shape in zip(placement.names, placement.shapes, strict=True):
            if folder.shape(name) != shape:
                raise ValueError(
                    f"{folder.file(name)}: tensor {name!r} has shape {list(folder.shape(name))}, but config.json asks "
                    f"for {list(shape)}"
                )
            folder.dtype(name)
