# SPDX-License-Identifier: Apache-2.0
"""patch(): turns a Hugging Face model into one that prunes its tokens, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from madtp.config import CompressionConfig
from madtp.dtp.branch import Branch, in_this_thread
from madtp.dtp.ragged import RaggedAttention
from madtp.dtp.selection_rules import METHOD
from madtp.dtp.settings import EXTRA_STATE, BranchSettings
from madtp.handles import find_handle
from madtp.hwp.packing import Epilogue, unpack
from madtp.mag import AlignmentGuide
from madtp.models.encoder import Encoder, RaggedBlock, containers
from madtp.models.family import CompressedModel, Family, find_epilogues
from madtp.models.mixing import change_class, check_forward, mixed, names_of
from madtp.models.registry import FAMILIES, family_of
from madtp.models.tower import FORWARDS, RaggedTower, ragged
from madtp.models.versions import check_transformers
from madtp.models.vlm import unsupported_reason
from madtp.patching import explain
from madtp.patching.keep_rate import (
    check_calibration,
    check_rates,
    check_temperatures,
    find_temperatures,
    kept_shares,
)
from madtp.patching.saving import complete_state_dict, save
from madtp.patching.state import Packed, Settings
from madtp.patching.vlm_handle import VlmHandle, patch_decoder
from madtp.width import widths_of


class Handle:
    """A patched model's controls; `patch` makes it and the model keeps it as `model.madtp_handle`."""

    def __init__(self, model: nn.Module, family: Family, config: CompressionConfig, capacity: str = "exact"):
        _check_capacity(capacity, config)
        if config.keep is not None:
            raise ValueError(
                f"config must have no keep for a model whose towers prune, got some for a {type(model).__name__}"
            )
        _check_whole(model)
        self.model, self.family, self.config = model, family, config
        specs = {branch: family.tower(model, branch) for branch in family.towers}  # raises before anything is touched
        towers: dict[str, Any] = {branch: model.get_submodule(family.path(branch)) for branch in specs}
        widths = {branch: tower.config.hidden_size for branch, tower in towers.items()}
        with torch.inference_mode(False):  # whose tensors could not be trained later
            guide = AlignmentGuide(config.alignment_tokens, config.alignment_dim, widths).to(next(model.parameters()))
        attention = {branch: RaggedAttention() for branch in widths}
        self.pruning = {branch: Branch(branch, guide, attention[branch], config.selection) for branch in widths}
        if "vision" in self.pruning:
            self.pruning["vision"].samples_per_feature = family.images_per_text
        self.capacity = capacity
        mixins: list[tuple[str, type]] = []
        for branch, spec in specs.items():
            path = ".".join(filter(None, (family.path(branch), spec.encoder.blocks)))
            mixins.append((family.path(branch), FORWARDS[spec.inputs]))
            mixins += [(f"{path}.{number}", RaggedBlock) for number, _ in model.get_submodule(path).named_children()]
        mixins += [(name, mixin) for pattern, mixin in family.mixins.items() for name in names_of(model, pattern)]
        self.sources: dict[str, type] = {}  # module name -> the class to go back to
        for branch, spec in specs.items():
            if isinstance(family.towers[branch], str):  # of a class that `towers.TOWERS` describes
                _check_classes(towers[branch], spec.encoder, family.path(branch))
        for name, _ in (("", None), *mixins):
            check_forward(model.get_submodule(name), name)
        try:
            model.madtp_guide = guide
            model.madtp_attention = nn.ModuleDict(attention)
            model.madtp_settings = BranchSettings(self.pruning)
            for branch, tower in towers.items():
                tower.madtp_spec, tower.madtp_branch = specs[branch], self.pruning[branch]
            for name, mixin in mixins:
                self._mix_in(name, mixin)
            self._mix_in("", CompressedModel, family.compressed)
            model.madtp_handle = self  # type: ignore[assignment]  # torch declares tensors and modules alone
        except BaseException:
            self._detach()
            raise

    def _mix_in(self, name: str, mixin: type, into: type | None = None) -> None:
        module = self.model.get_submodule(name)
        kind: Any = type(module)  # mypy holds a type[nn.Module] to be unhashable
        if not issubclass(kind, mixin):  # as a block that the model has in several places
            self.sources.setdefault(name, kind)
            change_class(module, into or mixed(kind, mixin))

    @property
    def guide(self) -> AlignmentGuide:
        """MAG, with the alignment tokens and each branch's map."""
        return cast(AlignmentGuide, self.model.madtp_guide)

    @property
    def settings(self) -> BranchSettings:
        """What the branches are set to, as it travels with a state dict."""
        return cast(BranchSettings, self.model.madtp_settings)

    @property
    def alignment_tokens(self) -> nn.Parameter:
        """(K, d), shared by the branches."""
        return self.guide.alignment_tokens

    @property
    def branches(self) -> dict[str, tuple[str, ...]]:
        """The modules of each branch, its attention and its part of MAG among them."""
        ours = ("madtp_attention.{}", "madtp_guide.maps.{}", "madtp_guide.logits.{}")
        return {
            branch: (*names, *(name.format(branch) for name in ours if branch in self.pruning))
            for branch, names in self.family.branches.items()
        }

    @property
    def spending(self) -> dict[str, tuple[str, ...]]:
        """The modules of each part that has MACs of its own to spend."""
        return self.branches

    @property
    def dense_modules(self) -> tuple[str, ...]:
        """Whose weights stay dense."""
        return *self.family.dense_modules, "madtp_guide"

    def as_left(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the last forward: what its outputs are of is all that was given."""
        return dict(inputs)

    @property
    def epilogues(self) -> dict[str, Epilogue]:
        """Of `madtp.hwp.pack`: what follows which Linear."""
        found: dict[str, Epilogue] = {}
        for branch in self.family.towers:
            tower = self.tower(branch)
            found |= find_epilogues(self.family.path(branch), tower, tower.madtp_spec.encoder)
        return found

    def tower(self, branch: str) -> RaggedTower:
        """The encoder of a branch."""
        return ragged(self.model.get_submodule(self.family.path(branch)))

    @property
    def capacity(self) -> str:
        """Of `patch`; may be set at any time."""
        return next(iter(self.pruning.values())).capacity

    @capacity.setter
    def capacity(self, capacity: str) -> None:
        _check_capacity(capacity, self.config)
        for branch in self.pruning.values():
            branch.capacity = capacity

    @property
    def temperatures(self) -> dict[str, float]:
        return {name: branch.temperature for name, branch in self.pruning.items()}

    def set_temperature(self, temperature: float | Mapping[str, float]) -> None:
        """tau of all branches, or of some by name; larger prunes more, 0 is the dense model."""
        for name, value in check_temperatures(temperature, self.pruning).items():
            self.pruning[name].temperature = value

    def set_keep_rate(
        self, keep_rate: float | Mapping[str, float], calibration: Iterable[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Sets the temperatures at which all branches, or some by name, keep a share of their tokens: no training.

        Args:
            keep_rate: in (0, 1]; the share of a branch's tokens that are left after a block, averaged over its blocks
                and all samples, without summary and merged tokens. 1 switches pruning off.
            calibration: a few batches, each the keyword arguments of a forward, on the model's device.

        Returns:
            the share each branch keeps of them now.

        Raises:
            ValueError: an argument breaks a rule, or no temperature of the config reaches the rate; nothing is changed.
        """
        rates, batches = check_rates(keep_rate, self.pruning), check_calibration(calibration)
        return dict(find_temperatures(self, rates, lambda: kept_shares(self, batches), self.config))

    def collect_alignment(self, on: bool) -> None:
        """Whether forwards compute the aligned features of MAG (training does)."""
        for branch in self.pruning.values():
            branch.align = on

    @property
    def aligned(self) -> dict[str, Tensor | None]:
        """Per branch, the (B, K, d) aligned features of the last forward of this thread.

        Their gradients go once a backward has passed: the model keeps no graph.
        """
        return {name: branch.last.aligned() for name, branch in self.pruning.items()}

    @property
    def summary_features(self) -> dict[str, list[Tensor]]:
        """Per branch, the (B, C) summary tokens after each layer of the last forward of this thread.

        Their gradients go once a backward has passed: the model keeps no graph.
        """
        return {name: branch.last.summary_features for name, branch in self.pruning.items()}

    @property
    def selections(self) -> dict[str, list[list[Tensor]]]:
        """Of the last forward of this thread: the original positions of the tokens left, by branch, layer, sample."""
        return {name: [layer.kept_positions() for layer in branch.last.layers] for name, branch in self.pruning.items()}

    @property
    def tokens_per_layer(self) -> dict[str, list[float]]:
        """Of the last forward of this thread: the mean number of tokens after each layer, merged ones included, by
        branch."""
        return {
            name: [layer.count_rows() / max(layer.num_sequences, 1) for layer in branch.last.layers]
            for name, branch in self.pruning.items()
        }

    def explain(self) -> str:
        """A table of what runs in the towers, and why: the backend of every op and every Linear, by branch and layer.

        Layers in a row that run the same share their lines. After a forward it is of calls like those of the last one,
        and there are lines with the mean number of tokens entering and leaving each layer. Nothing runs, but where a
        2:4 Linear has a choice that was not measured yet.
        """
        return explain.table(self)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """A context in which the model is as after training, for the thread that enters it: aligned features are not
        collected."""
        with in_this_thread(self.pruning.values(), "inference"):
            yield

    @contextmanager
    def dense(self) -> Iterator[None]:
        """A context in which the model is the dense one, for the thread that enters it: nothing pruned, no alignment
        computed. A checkpoint around the whole model runs again as what is set then: have its backward inside too."""
        with in_this_thread(self.pruning.values(), "inference", "dense"):
            yield

    def remove(self) -> nn.Module:
        """Undoes everything: the model is of its Hugging Face class again, its Linears plain, no alignment tokens.

        But heads and channels that `madtp.width` removed are gone, and Hugging Face cannot load what is saved so."""
        unpack(self.model)
        return self._detach()

    def _detach(self) -> nn.Module:
        """Leaves nothing of `__init__`, however far it came."""
        for branch in self.family.towers:
            for name in ("madtp_spec", "madtp_branch"):
                vars(self.tower(branch)).pop(name, None)
        for path, source in reversed(self.sources.items()):
            change_class(self.model.get_submodule(path), source)
        for name in ("madtp_guide", "madtp_attention", "madtp_settings", "madtp_handle"):
            if hasattr(self.model, name):
                delattr(self.model, name)
        return self.model

    def save(self, write: Callable[..., None], options: dict[str, Any]) -> None:
        """`save_pretrained` of the model, of which `write` is the one of Hugging Face."""
        save(self, write, **options)

    def saved(
        self, packed: dict[str, Packed], state_dict: Mapping[str, Tensor] | None
    ) -> tuple[Settings, Mapping[str, Tensor] | None]:
        """What config.json is to hold, and the state dict to write. Settings that the state dict carries count."""
        values = self.settings.values()
        if state_dict is not None:
            state_dict = complete_state_dict(self.model, state_dict, **{EXTRA_STATE: self.settings.get_extra_state()})
            values = self.settings.parse(state_dict[EXTRA_STATE])
        return Settings(self.config, values, packed, widths=widths_of(self.model)), state_dict


@overload
def patch(
    model: nn.Module,
    *,
    keep: Mapping[str, Any],
    keep_rate: float | Mapping[str, float] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> VlmHandle: ...
@overload
def patch(
    model: nn.Module,
    config: CompressionConfig | None = None,
    *,
    family: Family | None = None,
    keep_rate: float | Mapping[str, float] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    capacity: str = "exact",
) -> Handle: ...
def patch(
    model: nn.Module,
    config: CompressionConfig | None = None,
    *,
    family: Family | None = None,
    keep_rate: float | Mapping[str, float] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    capacity: str = "exact",
    keep: Mapping[str, Any] | None = None,
) -> Handle | VlmHandle:
    """Gives a Hugging Face model token pruning; at temperature 0, where it starts, it computes what it did before.

    Args:
        model: of a class in `madtp.models.FAMILIES`, or of one that `family` describes. Its parameters stay as they
            are; the alignment tokens join them as `madtp_guide`.
        config: alignment and selection settings; of a decoder that reads images those of its training, with the seams
            of `config.keep`.
        family: which towers prune; None takes what is known of the model's class.
        keep_rate, calibration: of `Handle.set_keep_rate`, to prune without training; None leaves temperature 0.
        capacity: "exact": every block computes on the tokens that are left, which a GPU has to report to the host.
            "upper_bound": on as many rows as there were tokens at first, those past the tokens left being of no
            meaning, and nothing is read on the host, so that a forward of given shapes fits a CUDA graph; with
            gradients or in training mode it is as "exact".
        keep: for decoders that read images, without config, family and capacity: by seam, what is left of each image, a
            share (float), a count (int) or a `madtp.Keep`. The seam "vision" is inside the tower. The seam "projector"
            is behind the projector, before the decoder: of every class whose forward takes `mm_encoder_outputs`, and
            Florence-2. The seam "prefill" is inside the decoder: a dict by how many layers have run, such as
            {2: 0.5, 16: 0.25}, of the tokens that entered. With keep_rate, temperatures are found for the seams that
            have one, `VlmHandle.set_keep_rate`; with keep_rate alone, a decoder gets these seams: "vision" of a number,
            those that it names of a mapping.

    Returns:
        the model's controls, of a decoder a `VlmHandle`.

    Raises:
        TypeError: the class is not known. ValueError: the model, a part of it or what it is a part of is patched
            already; a module that would get another forward has one set on the object; the capacity is unknown or the
            config's selection has none but "exact"; or what `Handle.set_keep_rate` says of its arguments. RuntimeError:
            transformers is too old. The model is as it was.
    """
    check_transformers()
    if find_handle(model) is not None:
        raise ValueError("model must not be patched already; call model.madtp_handle.remove() first")
    family = family or (family_of(model) if keep is None else None)
    trained = keep is None and keep_rate is None and config is not None  # and perhaps a decoder
    asked = keep_rate is not None or trained
    if keep is not None or (family is None and asked and unsupported_reason(model) is None):
        others: dict[str, Any] = {"config": None if trained else config, "family": family}
        others |= {"capacity": None if capacity == "exact" else capacity}
        if given := [name for name, value in others.items() if value is not None]:
            what = "keep" if keep is not None else "config of a decoder" if trained else "keep_rate of a decoder"
            raise ValueError(f"{what} must come without settings of pruned towers, got {', '.join(given)} too")
        return patch_decoder(model, keep, keep_rate, calibration, config if trained else None)
    if family is None:
        known = ", ".join(family.source.__name__ for family in FAMILIES if family.source is not None)
        raise TypeError(f"model must be one of {known}, or come with a family=, got {type(model).__name__}")
    if keep_rate is None:
        if calibration is not None:
            raise ValueError("keep_rate must be given with calibration, got None")
        return Handle(model, family, config or CompressionConfig(), capacity)
    rates, batches = check_rates(keep_rate, family.towers), check_calibration(calibration)
    handle = Handle(model, family, config or CompressionConfig(), capacity)
    try:
        handle.set_keep_rate(rates, batches)
    except BaseException:
        handle._detach()
        raise
    return handle


def _check_capacity(capacity: str, config: CompressionConfig) -> None:
    if capacity not in ("exact", "upper_bound"):
        raise ValueError(f'capacity must be "exact" or "upper_bound", got {capacity!r}')
    if capacity != "exact" and config.selection != METHOD:
        raise ValueError(f'capacity must be "exact" with selection {config.selection!r}, got {capacity!r}')


def _check_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, RaggedTower | RaggedBlock):
            got = f"{name}, which is one" if name else f"a {type(module).__name__} of a patched model"
            raise ValueError(f"model must have no part that is patched already, got {got}")


KNOWN = ("transformers", "torch", "madtp")  # whose forwards are as `towers.TOWERS` describes them


def _check_classes(tower: nn.Module, spec: Encoder, path: str) -> None:
    """Raises ValueError where a forward that would not be called is of the user's own."""
    named = [(path, tower)]
    for number, block in attrgetter(spec.blocks)(tower).named_children():
        prefix = ".".join(filter(None, (path, spec.blocks, number)))
        named += [(f"{prefix}.{name}".rstrip("."), block.get_submodule(name)) for name in sorted(containers(spec))]
    for name, module in named:
        forward = type(module).forward
        if getattr(forward, "__module__", "").partition(".")[0] not in KNOWN:
            raise ValueError(
                f"{name or 'model'}.forward must be one of transformers, for a patched tower computes what that does, "
                f"got the {type(module).__name__} of {forward.__module__}: describe it with family="
            )
