"""The methods of one evaluation: which they are, where their checkpoints are, and loading them one after the other."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from compressor.api import Compressor
from compressor.errors import CompressorError
from compressor.evaluation.settings import TaskSettings
from compressor.files import bundled
from compressor.methods.interface import Method, MethodSettings, check_tokens
from compressor.methods.table import (
    READINGS,
    TRAINED,
    UNTRAINED,
    memory_method,
    split_spec,
    untrained_method,
)
from compressor.model.base import Base
from compressor.model.cartridge import cartridge_folder
from compressor.model.checkpoint import compressor_fingerprint, fetch_checkpoint, find_base, read_settings
from compressor.model.config import BaseConfig
from compressor.model.load import load_base

SIZES = (4, 1)
"""Numbers of memory tokens, besides all, that bounds are shown with where none is asked for."""


class Methods:
    """The methods of an evaluation, loaded one after the other: each compressor puts adapters into a base of its own.

    Everything that can be known without weights is checked at once: names, checkpoints and their bases.

    Args:
        bounds: methods to run beside the checkpoint's own where the settings name none (`Task.bounds`).

    Raises:
        CompressorError: an unknown method or one named twice, a checkpoint that is missing, damaged, of another method
            or of another base than the others, or more memory tokens than the checkpoint has.
    """

    def __init__(self, config: TaskSettings, accelerator: Accelerator, bounds: Sequence[str] = ()) -> None:
        self.config, self.accelerator = config, accelerator
        specs = [split_spec(spec) for spec in config.methods]
        names = [name for name, _ in specs]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise CompressorError(
                f"methods names {repeated[0]} more than once, and the rows of a table are told apart by the method: "
                "evaluate its checkpoints one after the other"
            )
        needed = not specs or config.base is None or any(name not in UNTRAINED for name, _ in specs)
        self.settings: dict[str, Any] | None = None
        if needed or Path(bundled(config.checkpoint)).is_dir():
            self.settings = read_settings(fetch_checkpoint(config.checkpoint))
        self.own: str = self.settings["config"].get("method", "kv") if self.settings else "kv"
        if not specs:
            specs = [(name, None) for name in dict.fromkeys([self.own, *filter(self._there, bounds)])]
        self.specs = [(name, self._place(name, place)) for name, place in specs]
        most = self.settings["config"]["memory_tokens"] if self.settings else 16
        if config.tokens and self.settings:
            check_tokens(config.tokens, most, config.checkpoint)
        self.tokens = list(config.tokens) or [most, *(size for size in SIZES if bounds and size < most)]
        self._fingerprints: dict[str, str] = {}
        self._base: dict[str, Any] = {}

    def _there(self, bound: str) -> bool:
        """Whether a bound can be run. Recited texts are read after a prefix where one ships for the base, else as they
        are; trained bounds lie beside the checkpoint."""
        if bound in READINGS:
            assert self.settings is not None
            shipped = cartridge_folder(self.settings["base"]["fingerprint"]) is not None
            return shipped == (bound == "recite-tuned")
        return bound not in TRAINED or self._beside(bound) is not None

    def _beside(self, name: str) -> str | None:
        """The checkpoint of a trained method that lies beside the evaluated one, or in methods/ there."""
        folder = Path(self.config.checkpoint).parent
        places = (str(folder / "methods" / name), str(folder / name))
        return next((place for place in places if Path(bundled(place)).is_dir()), None)

    def _place(self, name: str, place: str | None) -> str | None:
        """Where a trained method's checkpoint is, by name where none is given; checked. None for other methods."""
        if name in UNTRAINED:
            if place is not None:
                raise CompressorError(f"the method {name} has no checkpoint: write {name}, not {name}={place}")
            return None
        if place is None and (name == self.own or name in READINGS):
            return self.config.checkpoint
        assert self.settings is not None
        if place is None:
            place = self._beside(name)
            if place is None:
                folder = Path(self.config.checkpoint).parent
                raise CompressorError(
                    f"there is no checkpoint of the method {name} at {folder / name} or {folder / 'methods' / name}: "
                    f"write {name}=CHECKPOINT, or train one (configs/arxiv-mini/methods.yaml)"
                )
        found = read_settings(fetch_checkpoint(place))
        held = found["config"].get("method", "kv")
        if name in TRAINED and held != name:
            raise CompressorError(f"{place} holds the method {held}, not {name}: write {held}={place}")
        ours, theirs = (one["base"] for one in (self.settings, found))
        if ours["fingerprint"] != theirs["fingerprint"]:
            raise CompressorError(
                f"{place} was trained on the base {theirs['path']} (weights {theirs['fingerprint'][:12]}), but "
                f"{self.config.checkpoint} on {ours['path']} (weights {ours['fingerprint'][:12]}): methods are "
                "compared on one base, so evaluate it apart"
            )
        return place

    def segment_tokens(self) -> int | None:
        """Most tokens of a segment of the trained methods; None where there are none."""
        most = self.settings["config"].get("max_passage_tokens") if self.settings else None
        asked = self.config.segment_tokens
        return asked if asked and most else most

    def question_template(self) -> str | None:
        """The checkpoint's prompt of a question."""
        return self.settings["config"].get("question_template") if self.settings else None

    def __iter__(self) -> Iterator[Method]:
        """Those without a checkpoint first. They are all made before one is run, so that what one of them lacks shows
        at once; and none is kept, so that a large base is held once at a time if the caller keeps none either."""
        config = self.config
        plain = [name for name, _ in self.specs if name in UNTRAINED]
        if plain:
            settings = MethodSettings(config.summariser, config.llmlingua)
            base = self._plain_base()
            self._note_base(base)
            made = [untrained_method(name, base, settings) for name in plain]
            del base
            while made:
                yield made.pop(0)
            gc.collect()
        for name, place in self.specs:
            if name in UNTRAINED:
                continue
            assert place is not None
            model = Compressor.from_pretrained(place, device=self.accelerator.device, **config.loading)
            self._fingerprints[name] = compressor_fingerprint(model, settings=True)
            self._note_base(model.base)
            method = memory_method(name)(
                model,
                config.batch_size,
                config.segment_tokens,
                config.refine_steps,
                config.refine_from,
                config.refine_keep,
            )
            del model
            yield method
            del method
            gc.collect()

    def _plain_base(self) -> Base:
        """The base without adapters, the one that the checkpoint was trained on if there is a checkpoint."""
        config, device = self.config, self.accelerator.device
        if self.settings is not None:
            return find_base(config.checkpoint, device=device, **config.loading)[1]
        assert config.base is not None
        base = load_base(BaseConfig(path=config.base, dtype=config.dtype), device)
        base.decoding = config.decoding
        return base

    def _note_base(self, base: Base) -> None:
        named = {"path": base.name, "fingerprint": base.fingerprint, "dtype": base.dtype_name}
        self._base = {**named, "positions": base.positions}

    def describe(self, name: str) -> dict[str, Any]:
        """Checkpoint and its hash, of a method that has one."""
        if name in UNTRAINED:
            return {}
        return {"checkpoint": dict(self.specs)[name], "fingerprint": self._fingerprints[name]}

    def checkpoint_record(self) -> dict[str, Any]:
        """The checkpoint that was named, whether or not its method was run."""
        ours = dict(self.specs).get(self.own) == self.config.checkpoint
        return {"path": self.config.checkpoint, "fingerprint": self._fingerprints.get(self.own) if ours else None}

    def base_record(self) -> dict[str, Any]:
        """The base of the method that was loaded last; all have the same."""
        return self._base
