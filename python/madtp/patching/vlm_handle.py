# SPDX-License-Identifier: Apache-2.0
"""The controls of a decoder that was patched with `keep=`: what is left of its images, seam by seam."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn

from madtp.config import CompressionConfig
from madtp.dtp.keep import Keep
from madtp.hwp.packing import Epilogue, unpack
from madtp.inference import evaluating
from madtp.models.bare_rows import image_units
from madtp.models.decoder_features import DecoderFeatures, RecordedHead, RecordedLayer
from madtp.models.mixing import change_class, check_forward, mixed
from madtp.models.patched_head import features_of
from madtp.models.prefill_layers import PrefillLayer, WatchedAttention
from madtp.models.projector_seam import ProjectorSeam
from madtp.models.prompt import (
    FILLS,
    MODALITIES,
    PIXELS,
    Images,
    count_images,
    find_images,
    find_placeholders,
    in_prompt_order,
    token_of,
)
from madtp.models.pruned_prefill import PrunedPrefill
from madtp.models.pruned_vision import PrunedVision, parts_of
from madtp.models.vision_layers import TowerAttention, TowerLayer, attention_of
from madtp.models.vision_seam import TowerRecord
from madtp.models.vlm import (
    decoder_of,
    mixin_of,
    tower_layers,
    unsupported_reason,
    vision_unsupported_reason,
    window_of,
)
from madtp.models.vlm_branches import branches_of
from madtp.patching.keep_rate import check_calibration, check_rates, check_temperatures, find_temperatures
from madtp.patching.saving import save
from madtp.patching.state import Packed, Settings
from madtp.patching.vlm_explain import explained
from madtp.patching.vlm_keep import (
    ENTERED,
    PREFILL,
    PROJECTOR,
    VISION,
    Amounts,
    check_keep,
    keep_by_temperature,
    make_seams,
    saved_keep,
    temperature_of,
    with_temperature,
)


class VlmHandle:
    """A patched decoder's controls; `madtp.patch(keep=)` makes it and the model keeps it as `model.madtp_handle`.

    Args:
        seams: by name, where image tokens are pruned: "vision", "projector", "prefill", or several.
        config: of a model that is trained, which then leaves its `summary_features`; None: it is not.
    """

    pruning: Mapping[str, Any] = {}  # the branches of towers that `Handle` patches: there are none
    epilogues: Mapping[str, Epilogue] = {}

    def __init__(self, model: nn.Module, keep: Mapping[str, Any], config: CompressionConfig | None = None):
        checked = check_keep(keep)
        self.model, self.config = model, config
        if (reason := unsupported_reason(model)) is not None:
            raise TypeError(f"model must have a projector seam, {reason}, got {type(model).__name__}")
        self.seams = make_seams(model, checked)
        self._mixed = dict(self.seams)
        if VISION in self.seams:  # what a tower has lost goes out of the prompt where the projector's tokens do
            self._mixed.setdefault(PROJECTOR, ProjectorSeam(Keep(1.0, rule="uniform")))
        for name, module in model.named_modules():
            if hasattr(module, "madtp_handle"):
                raise ValueError(f"model must have no part that is patched already, got {name or 'model'}")
        modules = [(model, mixin) for mixin in self._head_mixins()]
        if VISION in self.seams:
            layers, base = tower_layers(model), cast(nn.Module, model.base_model)
            modules += [(base, PrunedVision), *((layer, TowerLayer) for layer in layers)]
            modules += [(attention_of(layer), TowerAttention) for layer in layers]
        if PREFILL in self.seams:
            decoder = decoder_of(model)
            modules += [(layer, PrefillLayer) for layer in decoder.layers]
            modules += [(decoder.layers[layer - 1].self_attn, WatchedAttention) for layer in self.seams[PREFILL].keep]
        self._features = None if config is None else DecoderFeatures()
        if self._features is not None:
            modules += [(model, RecordedHead), *((layer, RecordedLayer) for layer in self._decoder_layers())]
        names = {module: name for name, module in model.named_modules()}
        for module, _ in modules:
            check_forward(module, names[module])
        self.sources: dict[nn.Module, type] = {}
        for module, mixin in modules:
            source: Any = type(module)  # mypy holds a type[nn.Module] to be unhashable
            self.sources.setdefault(module, source)
            change_class(module, mixed(source, mixin))
        self._attach()

    def _head_mixins(self) -> list[type]:
        """From the inner one to the outer one."""
        mixins = {PREFILL: PrunedPrefill, PROJECTOR: mixin_of(self.model)}
        return [mixin for name, mixin in mixins.items() if name in self._mixed]

    def _attach(self) -> None:
        model: Any = self.model  # torch declares tensors, modules
        for name in (PROJECTOR, PREFILL):
            if name in self._mixed:
                setattr(model, f"madtp_{name}", self._mixed[name])
        for module in self._tower_modules():
            module.madtp_vision = self.seams[VISION]
        if PREFILL in self.seams:
            decoder = decoder_of(model)
            for number, layer in enumerate(decoder.layers):
                layer.madtp_prefill = layer.self_attn.madtp_prefill = self.seams[PREFILL]
                layer.madtp_window = window_of(decoder.config, number)
        for module in self._recorded_modules():
            module.madtp_features = self._features
        model.madtp_handle = self

    def _decoder_layers(self) -> list[Any]:
        return list(getattr(decoder_of(self.model), "layers", ()))

    def _recorded_modules(self) -> list[Any]:
        """What takes part in leaving features."""
        return [] if self._features is None else [self.model, *self._decoder_layers()]

    def _tower_modules(self) -> list[Any]:
        """What knows of the seam in the tower."""
        if VISION not in self.seams:
            return []
        layers = tower_layers(self.model)
        return [self.model.base_model, *layers, *map(attention_of, layers)]

    @property
    def branches(self) -> dict[str, tuple[str, ...]]:
        """The modules of each branch, for accounting; what the seams do between modules is of the projector."""
        found = branches_of(self.model)
        return {**found, "projector": (*found["projector"], "")}

    @property
    def spending(self) -> dict[str, tuple[str, ...]]:
        """By seam with a temperature, the modules whose rows it decides on: all that run behind it, up to the next such
        seam. Of a seam behind another the modules come first. Without a temperature these are `branches`."""
        found: dict[str, tuple[str, ...]] = {}
        names = {module: name for name, module in self.model.named_modules()}
        if PREFILL in self.temperatures:
            decoder: Any = decoder_of(self.model)
            first = min(layer for layer, keep in self.seams[PREFILL].keep.items() if keep.temperature is not None)
            behind = [*decoder.layers[first:], self.model.get_output_embeddings()]  # type: ignore[operator]
            found[PREFILL] = tuple(names[module] for module in behind)
        if PROJECTOR in self.temperatures:
            found[PROJECTOR] = branches_of(self.model)["decoder"]
        if VISION in self.temperatures:
            found[VISION] = ("*",)
        return found or self.branches

    @property
    def dense_modules(self) -> tuple[str, ...]:
        """Whose weights stay dense: the head, which shares its weight with the embedding or might, and layers of the
        tower that do not run."""
        names = {module: name for name, module in self.model.named_modules()}
        idle: list[Any] = []
        if VISION in self.seams:
            _, tower, spec = parts_of(self.model.base_model)
            idle = list(attrgetter(spec.layers)(tower))[len(tower_layers(self.model)) :]
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return tuple(names[module] for module in (*idle, head) if module in names)

    def collect_alignment(self, on: bool) -> None:
        """As of any handle: a decoder has no alignment tokens."""

    @property
    def aligned(self) -> dict[str, Tensor | None]:
        """As of any handle: a decoder has no alignment tokens."""
        return {}

    @property
    def summary_features(self) -> dict[str, list[Tensor]]:
        """Of the last forward of this thread, after each layer of the decoder that some tokens may not reach: "text"
        (R, C), the rows of text, sample by sample, and "vision" (B, C), the mean of each prompt's image tokens.

        Of a model that is trained, and nothing of a forward without images; their gradients go once a backward has
        passed.
        """
        if self._features is None:
            return {}
        record = self._features.here.record
        return {"vision": record.vision, "text": record.text} if record.text else {}

    def as_left(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the last forward, their labels those of the columns that its logits are of; of a model that is
        trained."""
        labels, columns = inputs.get("labels"), None if self._features is None else self._features.here.record.left
        if labels is None or columns is None or self.model.config.is_encoder_decoder:  # type: ignore[union-attr]
            return dict(inputs)
        columns = columns.to(labels.device)
        moved = labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, FILLS["labels"])
        return {**inputs, "labels": moved}

    @property
    def keep(self) -> dict[str, Amounts]:
        """By seam, what is left of each image; of prefill by layer."""
        return {name: dict(seam.keep) if name == PREFILL else seam.keep for name, seam in self.seams.items()}

    @property
    def temperatures(self) -> dict[str, float]:
        """Of the seams where one decides how many are left."""
        found = {name: temperature_of(keep) for name, keep in self.keep.items()}
        return {name: tau for name, tau in found.items() if tau is not None}

    def set_temperature(self, temperature: float | Mapping[str, float]) -> None:
        """tau of all seams that were given one, or of some by name; larger prunes more, 0 keeps all.

        Raises:
            ValueError: a seam has none, or it is no number >= 0, or this handle was removed; nothing is changed.
        """
        self._check_attached()
        taus = check_temperatures(temperature, self.temperatures)
        for name, tau in taus.items():
            self.seams[name].keep = with_temperature(self.seams[name].keep, tau)

    def set_keep_rate(
        self, keep_rate: float | Mapping[str, float], calibration: Iterable[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Sets the temperatures at which all seams that were given one, or some by name, keep a share of the image
        tokens: each image its own number, no training.

        Args:
            keep_rate: in (0, 1]; what a share of `keep` is at the seam, over all images: of the tokens that come to it,
                in the tower of the units, those left behind its last layer. 1 switches pruning off there.
            calibration: a few batches, each the keyword arguments of a forward with images, on the model's device.

        Returns:
            the share each of these seams keeps of them now.

        Raises:
            ValueError: an argument breaks a rule, no temperature from 0.0001 to 1000 reaches the rate, the rate is 1
                where amounts or duplicates leave less, or this handle was removed; nothing is changed.
        """
        self._check_attached()
        rates, batches = check_rates(keep_rate, self.temperatures), check_calibration(calibration)
        if any(seam.here.dense for seam in self._mixed.values()):
            raise ValueError("keep_rate must be set outside of dense(), in which nothing is pruned")
        for batch in batches:
            if not self._has_pixels(batch):
                raise ValueError(
                    f"calibration must have pixels of images, got a batch with {', '.join(batch) or 'nothing'} alone"
                )
        return dict(find_temperatures(self, rates, lambda: self._kept_shares(batches), CompressionConfig()))

    def _kept_shares(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Of the seams with a temperature, in eval mode, without gradients."""
        entered, left = Counter[str](), Counter[str]()
        with evaluating(self.model):
            for batch in batches:
                for name, (before, after) in self._passed(batch).items():
                    entered[name] += before
                    left[name] += after
        for name in self.temperatures:
            if not entered[name]:
                raise ValueError(f"calibration must have image tokens to prune at the seam {name!r}, got none")
        return {name: left[name] / entered[name] for name in self.temperatures}

    def _has_pixels(self, batch: Mapping[str, Any]) -> bool:
        """Whether there are pixels that the model reads; what is encoded was pruned in the tower already."""
        known = [modality for modality in MODALITIES if token_of(self.model.config, modality) is not None]
        return any(batch.get(name) is not None for modality in known for name in PIXELS[modality])

    def _check_attached(self) -> None:
        """Raises ValueError where the model is no longer patched by this handle."""
        if getattr(self.model, "madtp_handle", None) is not self:
            raise ValueError("model must be patched by this handle, got one of which it was removed: patch it anew")

    def _passed(self, batch: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """By seam, how many tokens came to it in a forward, and were left; in the tower units. Only what has to run
        does."""
        model: Any = self.model
        if list(self.temperatures) == [VISION]:
            given = {name: value for name, value in batch.items() if value is not None}
            outputs = model._encoded(given)["mm_encoder_outputs"].values()
            return {VISION: _units(getattr(output, "madtp_left", None) for output in outputs)}
        model(**batch)
        found = {}
        if PROJECTOR in self._mixed:
            record = self._mixed[PROJECTOR].here.record
            kept, towers = record.selections(), record.tower_selections()
            entered = sum(record.lengths())
            came = sum(map(len, towers[-1])) if towers else entered
            found = {PROJECTOR: (came, sum(map(len, kept)))}
            if VISION in self.seams:
                found[VISION] = _units(record.towers)
        if PREFILL in self.seams:
            record = self.seams[PREFILL].here.record
            found[PREFILL] = sum(record.entered()), int(record.kept[max(record.kept)].sum())
        return found

    def check_fixed(self, argument: str) -> None:
        """Raises ValueError for an argument that asks for a static cache, whose length is to be known before, where
        this thread prunes and a seam decides by what it sees."""
        if any(seam.here.dense for seam in self._mixed.values()):
            return
        for name, amounts in self.keep.items():
            for keep in [amounts] if isinstance(amounts, Keep) else amounts.values():
                if not keep.is_fixed:
                    raise ValueError(
                        f"{argument} must not be static where a seam decides by what it sees how many tokens are left, "
                        f"got {keep.decided_by} at {name!r}"
                    )

    @property
    def selections(self) -> dict[str, Any]:
        """Of the last prompt with images of this thread, by seam: for each image, in the order of the prompt, the
        places kept among the tokens that the projector gives it, int64 ascending. Of prefill such a list by layer, and
        of the tower a list of them, layer after layer; "pixels" are those that entered it, where `duplicates` did
        not."""
        found: dict[str, Any] = {}
        for name, seam in self.seams.items():
            if name == VISION:
                record = self._mixed[PROJECTOR].here.record
                if seam.keep.duplicates is not None:
                    found[ENTERED] = record.tower_entries()
                found[name] = record.tower_selections()
            else:
                record = seam.here.record
                found[name] = {} if record is None else record.selections()
        return found

    def token_counts(self) -> tuple[list[int], dict[str, list[list[int]]]]:
        """Of the last prompt with images of this thread: how many tokens each image had, and by seam, layer after
        layer, how many of each were left."""
        if PROJECTOR in self._mixed:
            had = self._mixed[PROJECTOR].here.record.lengths()
        else:
            record = self.seams[PREFILL].here.record
            had = [] if record is None else record.entered()
        left: dict[str, list[list[int]]] = {}
        for name, found in self.selections.items():
            if name in self.seams and had:
                layers = [found] if name == PROJECTOR else found.values() if name == PREFILL else found
                left[name] = [[len(kept) for kept in layer] for layer in layers]
        return had, left

    @property
    def columns(self) -> Tensor | None:
        """(B, S') int64: the places of the whole prompt that were left in the last one of this thread, -1 for padding.

        The logits of a forward are of these. None before the first prompt with images.
        """
        records = [self._mixed[name].here.record for name in (PROJECTOR, PREFILL) if name in self._mixed]
        columns = records[0] and records[0].columns
        if len(records) == 1 or columns is None or records[1] is None:
            return columns
        inside = records[1].columns
        return columns.gather(1, inside.clamp(min=0)).masked_fill(inside < 0, -1)

    def counts(self, **inputs: Any) -> dict[str, Any]:
        """How many tokens of each image will be left, by seam, before anything is encoded; of prefill by layer, of the
        tower layer after layer.

        Args:
            inputs: those of a forward or of `generate`: read are `input_ids`, `attention_mask`, images that are encoded
                already, and shapes of pixels and grids; of Idefics 3 and SmolVLM also which tiles are zeros. Pixels are
                read where `duplicates` are to be found; how many enter the tower is said of "pixels".

        Raises:
            ValueError: what is left depends on more than lengths; a forward refuses the prompt; it does not say where
                an image ends; or this handle was removed.
        """
        self._check_attached()
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            raise ValueError(f"input_ids must be a tensor (B, S), got {type(input_ids).__name__}")
        self.model._check_prompt(input_ids, inputs)  # type: ignore[operator]
        known = [modality for modality in MODALITIES if token_of(self.model.config, modality) is not None]
        found = [self._found(input_ids, inputs, modality) for modality in known]
        images = [each for each, _, _ in found]
        ordered = in_prompt_order(images, (each.lengths for each in images))
        counts: dict[str, Any] = {}
        if (seam := self.seams.get(VISION)) is not None:
            if seam.keep.duplicates is not None:
                counts[ENTERED] = in_prompt_order(images, (entered for _, entered, _ in found))
            counts[VISION] = [
                in_prompt_order(images, (left[layer] for _, _, left in found)) for layer in range(seam.layers)
            ]
            ordered = counts[VISION][-1]
        if PROJECTOR in self.seams:
            counts[PROJECTOR] = ordered = self.seams[PROJECTOR].keep.counts(ordered)
        if PREFILL in self.seams:
            counts[PREFILL] = self.seams[PREFILL].counts(ordered)
        return counts

    def _found(
        self, input_ids: Tensor, inputs: Mapping[str, Any], modality: str
    ) -> tuple[Images, list[int], list[list[int]]]:
        """The images of a modality, checked as a forward does; how many tokens of each enter the tower, and by layer
        how many are left behind it."""
        config: Any = self.model.config
        base: Any = self.model.base_model
        seam, encoded = self.seams.get(VISION), (inputs.get("mm_encoder_outputs") or {}).get(modality)
        given = any(inputs.get(name) is not None for name in (*PIXELS[modality], f"{modality}_grid_thw"))
        left: list[list[int]] | None = None
        if encoded is not None:
            record = getattr(encoded, "madtp_left", None)
            parts = features_of(encoded, modality, find_placeholders(input_ids, config, modality))
            lengths = entered = [len(part) for part in parts]
            if record is not None:
                lengths, entered = record.lengths, [len(part) for part in record.entries()]
                left = [[len(part) for part in layer] for layer in record.selections()]
        elif given and self._knows_units():
            duplicates = None if seam is None else seam.keep.duplicates
            units = image_units(base, inputs, modality, pruned=seam is not None, duplicates=duplicates)
            lengths, entered = units.tokens(units.lengths), units.tokens(units.entered)
            if seam is not None:
                left = [units.tokens(layer) for layer in seam.counts(units.lengths, units.entered)]
        else:
            lengths = entered = count_images(input_ids, config, inputs, modality).lengths
        mask = inputs.get("attention_mask") if PROJECTOR in self._mixed else None  # prefill sees what is hidden
        images = find_images(input_ids, config, modality, lengths, mask)
        return images, entered, left or [lengths] * (0 if seam is None else seam.layers)

    def _knows_units(self) -> bool:
        """Whether shapes of pixels say how many tokens an image has."""
        if VISION in self.seams:
            return True
        if vision_unsupported_reason(self.model, None) is not None:
            return False
        return not parts_of(self.model.base_model)[0].packed  # where features may be interpolated

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """A context in which tokens are hidden and not removed, for the thread that enters it: the whole prompt, at
        its positions, with an attention mask of zeros where a token would go.

        The answers are those of pruning wherever attention alone carries tokens; sliding windows, convolutions and
        recurrent layers count the columns, and Florence-2 its positions. Inside a tower, units are removed as ever.
        """
        with self._counted("simulated"):
            yield

    @contextmanager
    def dense(self) -> Iterator[None]:
        """A context in which nothing is pruned, for the thread that enters it."""
        with self._counted("dense"):
            yield

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for seam in self._mixed.values():
                stack.enter_context(seam.here.counted(name))
            yield

    @contextmanager
    def inference(self) -> Iterator[None]:
        """As of any handle: there is nothing that training alone computes."""
        yield

    def explain(self) -> str:
        """A table of the seams: rule and amount, units, tokens and columns of the last prompt of this thread, and what
        is refused, and why."""
        return explained(self.model, self.seams, self._mixed)

    def remove(self) -> nn.Module:
        """Undoes everything: the model is of its Hugging Face class again, its Linears plain. Once done, no more."""
        if getattr(self.model, "madtp_handle", None) is not self:  # of another patch, or of none
            return self.model
        unpack(self.model)
        for module, source in self.sources.items():
            change_class(module, source)
        if PREFILL in self.seams:
            for layer in decoder_of(self.model).layers:
                del layer.madtp_prefill, layer.madtp_window, layer.self_attn.madtp_prefill
        for module in self._tower_modules():
            del module.madtp_vision
        for module in self._recorded_modules():
            del module.madtp_features
        for name in {PROJECTOR, PREFILL} & set(self._mixed):
            delattr(self.model, f"madtp_{name}")
        del self.model.madtp_handle
        return self.model

    def save(self, write: Callable[..., None], options: dict[str, Any]) -> None:
        """`save_pretrained` of the model, of which `write` is the one of Hugging Face."""
        save(self, write, **options)

    def saved(
        self, packed: dict[str, Packed], state_dict: Mapping[str, Tensor] | None
    ) -> tuple[Settings, Mapping[str, Tensor] | None]:
        """What config.json is to hold, and the state dict to write. Raises ValueError where a rule is a function."""
        return Settings(None, {}, packed, saved_keep(self.keep)), state_dict


def _units(towers: Iterable[TowerRecord | None]) -> tuple[int, int]:
    """How many units there were, and were left; of images that were encoded before there is no record."""
    pairs = [tower.units for tower in towers if tower is not None]
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)


def patch_decoder(
    model: nn.Module,
    keep: Mapping[str, Any] | None,
    keep_rate: float | Mapping[str, float] | None,
    calibration: Iterable[Mapping[str, Any]] | None,
    config: CompressionConfig | None = None,
) -> VlmHandle:
    """`madtp.patch` of a decoder."""
    if config is not None:
        if config.first_layer is not None:
            kind = type(model).__name__
            raise ValueError(f"first_layer must be None for a {kind}, whose keep says where, got {config.first_layer}")
        keep = keep_by_temperature(model, [VISION]) if config.keep is None else config.keep
    if keep_rate is None:
        if calibration is not None:
            raise ValueError("keep_rate must be given with calibration, got None")
        assert keep is not None, "one of them says what goes"
        return VlmHandle(model, keep, config)
    if keep is None:
        seams = keep_rate if isinstance(keep_rate, Mapping) else [VISION]
        check_rates(keep_rate, (VISION, PROJECTOR, PREFILL))
        keep = keep_by_temperature(model, seams)
    else:
        taus = [name for name, amounts in check_keep(keep).items() if temperature_of(amounts) is not None]
        if not taus:
            raise ValueError(
                "keep must have a seam with a temperature where keep_rate is to find it, such as "
                f"madtp.Keep(temperature=1.0), got none at {', '.join(map(repr, keep))}"
            )
        check_rates(keep_rate, taus)
    batches = check_calibration(calibration)
    handle = VlmHandle(model, keep)
    try:
        handle.set_keep_rate(keep_rate, batches)
    except BaseException:
        handle.remove()
        raise
    return handle
