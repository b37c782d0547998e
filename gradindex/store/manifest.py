"""What a store's rows mean, typed: the manifest and the map in it, as docs/format.md describes them.

Keys that a later version added are kept in ``unknown`` and written back; what an older version did not write stays
unwritten, for the fingerprint is a digest of all that was written.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from ..choices import FactorType, Norms, Precision, ProjectionKind, RowType
from ..files import digest_of
from .forms import needs_of, version_of
from .packing import Packing, Pair

# The highest version of the format that is read, and the one that rows are told apart by, which stays.
VERSION, _MAP_VERSION = 2, 1
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class ShardEntry(NamedTuple):
    """What the manifest says of one shard.

    Args:
        name: of its file and of its seal.
        first: its lowest id.
        last: its highest id.
        rows: how many ids it has, removed ones as well.
        data: digest of its ids and of samples of its examples.
        seal: checksum of its seal.
        origins: where its rows were computed, if not here: ``[seal, first id, last id]`` each.
        unknown: keys of a later version.
    """

    name: str
    first: int
    last: int
    rows: int
    data: str
    seal: str
    origins: list[list[Any]] | None = None
    unknown: Mapping[str, Any] = _NOTHING

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardEntry:
        """From a manifest's JSON, whose form was checked."""
        entry = cls(value["name"], value["first"], value["last"], value["rows"], value["data"], value["seal"])
        if len(value) == _PLAIN:
            return entry
        return entry._replace(origins=value.get("origins"), unknown=_besides(value, cls._fields))

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        written = {name: getattr(self, name) for name in self._fields[:_PLAIN]}
        return written | ({} if self.origins is None else {"origins": self.origins}) | dict(self.unknown)

    @property
    def computed_in(self) -> list[list[Any]]:
        """Where its rows were computed: seals of shards, and the first and last id that came from each.

        Compacting copies rows to new shards, so that their own seals do not tell that they are the same rows.
        """
        return self.origins or [[self.seal, self.first, self.last]]


# Keys that every entry has.
_PLAIN = 6


@dataclass(frozen=True)
class StoredLayer:
    """A layer whose gradients rows hold.

    Args:
        name: of the module, or of the parameter on the general routes; empty for the model itself.
        parameters: names of what is tracked in it.
        d_out: rows of its gradient.
        d_in: columns of its gradient.
        route: how its gradients were computed.
        unknown: keys of a later version.
    """

    name: str
    parameters: tuple[str, ...]
    d_out: int
    d_in: int
    route: str
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoredLayer:
        """From a manifest's JSON, whose form was checked."""
        known = ("name", "parameters", "shape", "route")
        d_out, d_in = value["shape"]
        return cls(value["name"], tuple(value["parameters"]), d_out, d_in, value["route"], _besides(value, known))

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        shape = [self.d_out, self.d_in]
        written = {"name": self.name, "parameters": list(self.parameters), "shape": shape, "route": self.route}
        return written | dict(self.unknown)

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name or "(model)"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint that rows have a block of.

    Args:
        sha256: of its file.
        step: of the training.
        weighting: where its learning rates come from.
        learning_rates: by tracked parameter.
        key: under which key of the file the weights are, if one was given.
        prefix: what was cut off the names of the weights, if anything.
        filled: names that the file lacks.
        passed_over: names that only the file has.
        unknown: keys of a later version.
    """

    sha256: str
    step: Any
    weighting: str
    learning_rates: Mapping[str, float]
    key: str | None = None
    prefix: str | None = None
    filled: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoredCheckpoint:
        """From a manifest's JSON, whose form was checked."""
        known = ("sha256", "step", "weighting", "learning_rates", "key", "prefix", "filled", "passed_over")
        return cls(
            sha256=value["sha256"],
            step=value["step"],
            weighting=value["weighting"],
            learning_rates=value["learning_rates"],
            key=value.get("key"),
            prefix=value.get("prefix"),
            filled=tuple(value.get("filled", ())),
            passed_over=tuple(value.get("passed_over", ())),
            unknown=_besides(value, known),
        )

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        written: dict[str, Any] = {"sha256": self.sha256}
        written |= {name: value for name in ("key", "prefix") if (value := getattr(self, name)) is not None}
        written |= {name: list(names) for name in ("filled", "passed_over") if (names := getattr(self, name))}
        written |= {"step": self.step, "weighting": self.weighting, "learning_rates": dict(self.learning_rates)}
        return written | dict(self.unknown)


@dataclass(frozen=True)
class StoredProjection:
    """Which map made the rows; ``unknown`` are keys of a later version."""

    kind: ProjectionKind
    dim: int
    seed: int
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoredProjection:
        """From a manifest's JSON, whose form was checked."""
        return cls(value["kind"], value["dim"], value["seed"], _besides(value, ("kind", "dim", "seed")))

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"kind": self.kind, "dim": self.dim, "seed": self.seed, **self.unknown}


@dataclass(frozen=True)
class RowMap:
    """Everything that rows depend on besides their examples: two rows compare only where these agree.

    Args:
        model: names and shapes of the model's tensors.
        loss: name of the loss.
        layers: what is tracked.
        checkpoints: a block of a row for each.
        projection: from gradients to rows.
        precision: of the gradients.
        preconditioner: of the geometry, ``None`` for plain TracIn.
        unit_norm: whether rows were divided by the norm of their gradients.
        bases: digest of what a fitted projection was fitted to; ``None`` for others, and before it is fitted.
        fitted_to: how many training examples there were to fit to.
        unknown: keys of a later version.
        unwritten: keys that an older version did not write.
    """

    model: tuple[tuple[str, tuple[int, ...]], ...]
    loss: str
    layers: tuple[StoredLayer, ...]
    checkpoints: tuple[StoredCheckpoint, ...]
    projection: StoredProjection
    precision: Precision
    preconditioner: str | None
    unit_norm: bool
    bases: str | None = None
    fitted_to: int | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)
    unwritten: frozenset[str] = frozenset()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RowMap:
        """From a manifest's JSON, whose form was checked."""
        return cls(
            model=tuple((name, tuple(shape)) for name, shape in value["model"]),
            loss=value["loss"],
            layers=tuple(map(StoredLayer.from_json, value["layers"])),
            checkpoints=tuple(map(StoredCheckpoint.from_json, value["checkpoints"])),
            projection=StoredProjection.from_json(value["projection"]),
            precision=value["precision"],
            preconditioner=value.get("preconditioner"),
            unit_norm=value["unit_norm"],
            bases=value["bases"],
            fitted_to=value["fitted_to"],
            unknown=_besides(value, _MAP_KEYS),
            unwritten=frozenset(_MAP_KEYS) - value.keys(),
        )

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        written = {
            "model": [[name, list(shape)] for name, shape in self.model],
            "loss": self.loss,
            "layers": [layer.to_json() for layer in self.layers],
            "checkpoints": [checkpoint.to_json() for checkpoint in self.checkpoints],
            "projection": self.projection.to_json(),
            "precision": self.precision,
            "preconditioner": self.preconditioner,
            "unit_norm": self.unit_norm,
            "bases": self.bases,
            "fitted_to": self.fitted_to,
        }
        return {name: value for name, value in written.items() if name not in self.unwritten} | dict(self.unknown)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what a row depends on besides its example: the version of its meaning and the map."""
        return digest_of({"version": _MAP_VERSION, "map": self.to_json()})

    def differences(self, other: RowMap, *, bases: bool) -> list[str]:
        """Names of what differs; ``bases`` says whether those of a fitted projection count."""
        names = _MAP_KEYS if bases else _MAP_KEYS[:-2]
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        if "layers" in differing and "checkpoints" in differing:
            # Rates are listed for the tracked parameters alone, so that other layers always list others.
            files = [[checkpoint.sha256 for checkpoint in side.checkpoints] for side in (self, other)]
            if files[0] == files[1]:
                differing.remove("checkpoints")
        return differing


@dataclass(frozen=True)
class Manifest:
    """What a store says of itself.

    Args:
        task: name of the task that it was built from.
        map: what its rows depend on.
        dim: numbers in a row.
        row_type: how rows are stored.
        factors: type of the exact factors, ``None`` where there are none.
        packing: by the number of a layer whose factors are packed, how its activations and output gradients are.
        self_influence: ``"exact"`` or ``"projected"``.
        columns: types by name, in NumPy's notation.
        next_id: the lowest id that was never used.
        removed: runs of ids ``[start, stop]`` that no answer holds.
        batch_size: examples in a pass, of which rows depend in their last bits.
        shard_rows: rows of a new shard.
        threads: of a pass, of which rows depend in their last bits.
        generation: how often the store has changed.
        tracked: which parameters are tracked and which are left out, for people; ``None`` in older stores.
        sources: what wrote each checkpoint, and what of it is the model's, for people; empty in older stores.
        merged: checksums of the manifests that were merged.
        shards: in the order of their ids.
        wide: numbers of a checkpoint in a wide row; ``None`` where there are none.
        unknown: keys of a later version.
        sha256: checksum of the manifest that was read; ``None`` before it is written.
    """

    task: str
    map: RowMap
    dim: int
    row_type: RowType
    factors: FactorType | None
    self_influence: Norms
    columns: Mapping[str, str]
    next_id: int
    removed: Sequence[Sequence[int]] = ()
    batch_size: int = 0
    shard_rows: int = 0
    threads: int = 0
    generation: int = 0
    tracked: Mapping[str, Any] | None = None
    sources: tuple[Mapping[str, Any], ...] = ()
    merged: tuple[str, ...] = ()
    packing: Mapping[int, Pair] = field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()
    wide: int | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """From a manifest, or the one that a plan leads to, whose form was checked."""
        plain = {name: value[name] for name in _PLAIN_KEYS}
        return cls(
            **plain,
            map=RowMap.from_json(value["map"]),
            generation=value["generation"],
            tracked=value.get("tracked"),
            sources=tuple(value.get("sources", ())),
            merged=tuple(value.get("merged", ())),
            packing={int(n): (Packing(*x), Packing(*delta)) for n, (x, delta) in value.get("packing", {}).items()},
            shards=tuple(map(ShardEntry.from_json, value.get("shards", ()))),
            wide=value.get("wide"),
            unknown=_besides(value, _KNOWN_KEYS),
            sha256=value.get("sha256"),
        )

    def to_json(self) -> dict[str, Any]:
        """What is written of it, without its shards."""
        written: dict[str, Any] = {"task": self.task, "map": self.map.to_json()}
        written |= {} if self.tracked is None else {"tracked": self.tracked}
        written |= {"sources": list(self.sources)} if self.sources else {}
        written |= {name: getattr(self, name) for name in _PLAIN_KEYS if name != "task"}
        written |= {"columns": dict(self.columns), "removed": [list(run) for run in self.removed]}
        written |= {"fingerprint": self.fingerprint}
        written |= {"merged": list(self.merged)} if self.merged else {}
        written |= {} if self.wide is None else {"wide": self.wide}
        packing = {str(number): [list(side) for side in pair] for number, pair in sorted(self.packing.items())}
        written |= {"packing": packing} if packing else {}
        return written | dict(self.unknown) | {"generation": self.generation}

    @property
    def fingerprint(self) -> str:
        """Of the map."""
        return self.map.fingerprint

    @property
    def version(self) -> int:
        """The lowest version of the format that has all that the store has."""
        return version_of(self.row_type, bool(self.packing))

    @property
    def needs(self) -> list[str]:
        """What a reader must know to read such a store, besides its version of the format."""
        return needs_of(self.columns, self.wide)

    @property
    def n_checkpoints(self) -> int:
        """Blocks in a row."""
        return len(self.map.checkpoints)

    @property
    def has_factors(self) -> bool:
        """Whether exact factors are stored."""
        return self.factors is not None

    @property
    def rows(self) -> int:
        """How many rows its shards hold, removed ones as well."""
        return sum(entry.rows for entry in self.shards)

    def differences(self, other: Manifest, *, bases: bool = False) -> list[str]:
        """What differs in the maps and in what is stored beside rows, in words; ``bases`` as for the map."""
        names = {"columns": "columns", "self_influence": "self_influence", "row_type": "row type"}
        names |= {"factors": "factors", "wide": "wide rows"}
        differing = self.map.differences(other.map, bases=bases)
        return differing + [words for name, words in names.items() if getattr(self, name) != getattr(other, name)]

    def __getitem__(self, name: str) -> Any:
        """The manifest as a mapping, as it was before version 0.2."""
        warnings.warn(f'manifest["{name}"] is deprecated, write manifest.{name}', DeprecationWarning, stacklevel=2)
        as_json = self.to_json() | {"shards": [entry.to_json() for entry in self.shards], "sha256": self.sha256}
        return as_json[name]


_MAP_KEYS = (
    "model", "loss", "layers", "checkpoints", "projection", "precision", "preconditioner", "unit_norm", "bases",
    "fitted_to",
)  # fmt: skip
_PLAIN_KEYS = (
    "task", "dim", "row_type", "factors", "self_influence", "columns", "next_id", "removed", "batch_size", "shard_rows",
    "threads",
)  # fmt: skip
# Of a manifest and of its header, and what a plan keeps beside the manifest that it leads to.
_KNOWN_KEYS = {*_PLAIN_KEYS, "map", "generation", "tracked", "sources", "merged", "packing", "shards", "fingerprint"}
_KNOWN_KEYS |= {"sha256", "format", "version", "needs", "data", "wide"}


def _besides(value: Mapping[str, Any], known: Any) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name not in known}
