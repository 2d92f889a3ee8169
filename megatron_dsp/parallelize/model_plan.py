"""What `parallelize` is told of a model: where its shards begin and end, and what its modules need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, NoReturn

from megatron_dsp.errors import UsageError
from megatron_dsp.parallelize.module_needs import HEADS, Boundary, Carried, Computed, LocalSize, Needs, Reduced, Slice
from megatron_dsp.parallelize.pattern import Pattern, parse


@dataclass(frozen=True)
class Plan:
    """Where the shard of an activation lies in a model.

    Attributes:
        modules: what modules need, by patterns of their names. A ``*`` stands for anything but a dot. Several needs of a module
            are those of its first call in a forward, its second one, and so on, and again from the first.
        enter: where activations become shards. The sizes of dims are taken from them, in each forward.
        leave: where they become whole again; None: they leave the model as shards of ``shard``.
        shard: the dim that is sharded between modules. With ``switching="lazy"`` it is that at the beginning, and None leaves
            it to the planner.
        shardable: the dims that may be sharded; empty: ``shard`` and all that some module needs whole.
        switching: "around": a module that needs the sharded dim whole gets it by a switch, and another one follows. "lazy": the
            modules hand one tensor on, and its shard moves as `planner.cheapest_plan` says.
        sizes: arguments of a module that runs before ``enter``, from which sizes are taken first. Of dims that are flattened
            where activations enter, all but one must be found there.
        attributes: by patterns of names of modules: what these modules find in attributes of their own (tables of positions,
            numbers of a config, as "config.num_frames"), made that of their part while they run in the region.
        independent: a dim of the activation, as the batch, in slices of which modules may run where the group's overlap says
            so: one slice's switches travel while others are computed. Modules that need it whole, and those without a switch,
            run whole. Its elements must not meet in the others.

    Errors: UsageError where its parts do not fit each other.
    """

    modules: Mapping[str, Needs | Sequence[Needs]]
    enter: Boundary
    leave: Boundary | None = None
    shard: str | None = None
    shardable: tuple[str, ...] = ()
    switching: Literal["around", "lazy"] = "around"
    sizes: Boundary | None = None
    attributes: Mapping[str, Mapping[str, Slice | LocalSize | Computed]] = field(default_factory=dict)
    independent: str | None = None

    def __post_init__(self) -> None:
        boundaries = [boundary for boundary in (self.enter, self.leave, self.sizes) if boundary is not None]
        if not self.modules or not all(boundary.tensors for boundary in boundaries):
            raise UsageError("a plan needs at least one module, and one tensor in each of enter=, leave= and sizes=")
        if self.switching not in ("around", "lazy"):
            raise UsageError(f"switching={self.switching!r} must be 'around' or 'lazy'")
        if self.switching == "around" and self.shard is None:
            raise UsageError("switching='around' needs shard=, the dim that is sharded between modules")
        if self.switching == "lazy":
            self._check_lazy()
        if self.sizes is not None and self.sizes.after:
            raise UsageError("sizes: they are taken from arguments; name a module that gets them, without after=True")
        known: set[str] = set()
        for where, text in self._sources():
            self._check_pattern(where, parse(text), known)
            known.update(parse(text).names)
        self._check_boundary("enter", self.enter)
        if self.leave is not None:
            self._check_boundary("leave", self.leave)
        for name, needs in self.all_needs():
            self._check_module(f"modules[{name!r}]", needs)
        for name, sides in self.attributes.items():
            self._check_attributes(f"attributes[{name!r}]", sides)
        if self.independent is not None:
            self._check_independent(self.independent)

    @property
    def dims(self) -> tuple[str, ...]:
        """The dims that may be sharded, in the order of preference between equals."""
        if self.shardable:
            return self.shardable
        named = [dim for _, needs in self.all_needs() for dim in needs.mixes]
        return tuple(dict.fromkeys([*([] if self.shard is None else [self.shard]), *named]))

    @property
    def known(self) -> tuple[str, ...]:
        """The dims whose sizes are taken before modules run: all but the entering activation's channels, which may change."""
        names = tuple(dict.fromkeys(name for _, text in self._sources() for name in parse(text).names))
        channels = parse(next(iter(self.enter.tensors.values()))).names[-1]
        return names if channels in self.dims else tuple(name for name in names if name != channels)

    def all_needs(self) -> Iterator[tuple[str, Needs]]:
        """Each pattern of names with each of its needs."""
        for name in self.modules:
            for needs in self.needs_of(name):
                yield name, needs

    def needs_of(self, name: str) -> tuple[Needs, ...]:
        """What the modules of the pattern ``name`` need, call by call."""
        needs = self.modules[name]
        return (needs,) if isinstance(needs, Needs) else tuple(needs)

    def _sources(self) -> list[tuple[str, str]]:
        """The patterns from which sizes are taken, in turn."""
        before = [] if self.sizes is None else [("sizes", text) for text in self.sizes.tensors.values()]
        return [*before, ("enter", next(iter(self.enter.tensors.values())))]

    def _check_lazy(self) -> None:
        for what, is_there, instead in (
            ("without leave=", self.leave is None, "the layout at the end is the planner's; give leave="),
            ("attributes=", bool(self.attributes), "use 'around', or pass them as arguments"),
            ("several needs of a module", any(len(self.needs_of(name)) > 1 for name in self.modules), "use 'around'"),
        ):
            if is_there:
                raise UsageError(f"switching='lazy': {what} is not built: {instead}")

    def _check_boundary(self, where: str, boundary: Boundary) -> None:
        if self.switching == "lazy" and len(boundary.tensors) > 1:
            raise UsageError(
                f"{where}: switching='lazy' is built for one tensor that is handed on; it names {len(boundary.tensors)}"
            )
        for text in boundary.tensors.values():
            self._check_pattern(where, parse(text), self.known)
        activation = next(iter(boundary.tensors.values()))
        outputs = [output for _, needs in self.all_needs() for output in needs.outputs.values()]
        reduced = [output.over for output in outputs if isinstance(output, Reduced)]
        for dim in self.dims:
            if dim not in parse(activation).names and not (boundary is self.leave and dim in reduced):
                raise UsageError(f"{where}: the first pattern, {activation!r}, must name {dim!r}, which may be sharded")

    def _check_module(self, where: str, needs: Needs) -> None:
        for key, side in needs.arguments.items():
            if not isinstance(side, (Slice, Carried, LocalSize, Computed)):
                raise UsageError(
                    f"{where}: arguments[{key!r}] is {side!r}; say Slice(...), Carried(...), LocalSize(...) or Computed(...)"
                )
            if isinstance(side, Carried) and self.switching == "lazy":
                raise UsageError(
                    f"{where}: arguments[{key!r}]: Carried with switching='lazy' is not built; pass it whole, as Slice"
                )
            self._check_size(f"{where}: arguments[{key!r}]", side)
        if needs.least < 1:
            raise UsageError(f"{where}: least={needs.least} must be at least 1; shards without elements are not served")
        named = parse(needs.pattern).names
        for dim in needs.mixes:
            if dim not in named:
                raise UsageError(f"{where}: whole={dim!r} is not in its pattern {needs.pattern!r}")
        if self.switching == "around" and self.shard not in named:
            raise UsageError(
                f"{where}: pattern {needs.pattern!r} does not name {self.shard!r}, the dim sharded between modules"
            )
        if not [dim for dim in self.dims if dim in named and dim not in needs.mixes]:
            raise UsageError(
                f"{where} needs {', '.join(needs.mixes)} whole, so none of {', '.join(self.dims)} can be sharded then; "
                "name another dim in shardable=, or leave before it"
            )
        for key, output in needs.outputs.items():
            self._check_output(f"{where}: outputs[{key!r}]", needs, output)
        if needs.attention is not None:
            self._check_attention(where, needs.attention)
        for pattern in needs.patterns:
            self._check_pattern(where, pattern, self.known)

    def _check_output(self, where: str, needs: Needs, output: str | Reduced) -> None:
        named, kept = parse(needs.pattern).names, output if isinstance(output, str) else output.pattern
        over = None
        if isinstance(output, Reduced):
            over = output.over
            if output.by not in ("sum", "mean") or over not in self.dims:
                raise UsageError(f"{where}: {output!r} must be by='sum' or 'mean', over one of the dims {', '.join(self.dims)}")
            if output.by == "sum" and over in parse(kept).names:
                raise UsageError(f"{where}: {kept!r} names {over!r}, of which the model can take the mean; say by='mean'")
        if lost := [dim for dim in self.dims if dim in named and dim not in parse(kept).names and dim != over]:
            raise UsageError(
                f"{where}: {kept!r} has no {lost[0]!r}, which may be sharded; if the module sums or averages over it, say "
                f"Reduced({kept!r}, over={lost[0]!r}, by=...)"
            )

    def _check_attention(self, where: str, text: str) -> None:
        pattern = parse(text)
        if HEADS not in pattern.names or HEADS in self.known or len(pattern.dims) < 3:
            raise UsageError(
                f"{where}: attention={text!r} must be the pattern of queries, with a dim named {HEADS!r} and the tokens before "
                f"the head size, as 'B {HEADS} N D'"
            )
        if self.switching == "around" and self.shard not in pattern.names:
            raise UsageError(f"{where}: attention={text!r} does not name {self.shard!r}, the dim sharded between modules")
        self._check_pattern(f"{where}: attention", pattern, self.known)

    def _check_attributes(self, where: str, sides: Mapping[str, Slice | LocalSize | Computed]) -> None:
        for path, side in sides.items():
            if not isinstance(side, (Slice, LocalSize, Computed)):
                raise UsageError(f"{where}: {path!r} is {side!r}; say Slice(...), LocalSize(...) or Computed(...)")
            self._check_size(f"{where}: {path!r}", side)
            if isinstance(side, Slice):
                self._check_pattern(where, parse(side.pattern), self.known)

    def _check_size(self, where: str, side: Any) -> None:
        dims = self.dims if self.independent is None else (*self.dims, self.independent)
        if isinstance(side, LocalSize) and side.dim not in dims:
            raise UsageError(f"{where}: {side.dim!r} is none of the dims {', '.join(dims)}")

    def _check_independent(self, dim: str) -> None:
        entering = [name for name in parse(next(iter(self.enter.tensors.values()))).names if name in self.known]
        if dim not in entering or (self.switching == "around" and dim == self.shard):
            raise UsageError(
                f"independent={dim!r} must be a dim of the activation that enters, {', '.join(entering)}, and not the one that "
                "is sharded between modules; the batch, as a rule"
            )
        for name, needs in self.all_needs():
            if dim not in needs.mixes and dim in parse(needs.pattern).names:
                self._check_slices(f"modules[{name!r}]", needs, dim)
        for name, sides in self.attributes.items():
            for path, side in sides.items():
                named = parse(side.pattern).names if isinstance(side, Slice) else ()
                if dim in named or side == LocalSize(dim):
                    raise UsageError(
                        f"attributes[{name!r}]: {path!r} depends on {dim!r}, which is independent=; attributes are the same "
                        "in all slices; pass it as an argument"
                    )

    def _check_slices(self, where: str, needs: Needs, dim: str) -> None:
        for output in needs.outputs.values():
            text = output if isinstance(output, str) else output.pattern
            if dim not in parse(text).names:
                raise UsageError(
                    f"{where}: {text!r} has no {dim!r}, which is independent=, so slices of it could not be joined; name it in "
                    "whole= of a module that mixes it"
                )
        for pattern in needs.patterns:
            if dim in pattern.names and pattern.dim_of(dim) in pattern.sums:
                raise UsageError(
                    f"{where}: {pattern.text!r} has other tokens beside {dim!r}, which is independent=; choose another dim"
                )

    def _check_pattern(self, where: str, pattern: Pattern, known: Sequence[str] | set[str]) -> None:
        for terms in pattern.dims:
            names = [[name for name in term if name not in known] for term in terms if not isinstance(term, int)]
            unknown = [name for term in names for name in term]
            if len(unknown) > 1:
                raise UsageError(
                    f"{where}: the sizes of {' and '.join(unknown)} in {pattern.text!r} cannot be told apart; find all but one "
                    "in sizes=, or give dims that are never sharded one name"
                )
            sharded = [term for term in terms if not isinstance(term, int) and set(term) & set(self.dims)]
            if len(sharded) > 1:
                raise UsageError(f"{where}: {pattern.text!r} adds dims that may be sharded; at most one of the terms may be")


def unknown_name(kind: str, name: str, known: list[str]) -> NoReturn:
    """Raise UsageError that suggests the nearest names."""
    near = get_close_matches(name, known, n=3, cutoff=0.4)
    raise UsageError(f"{kind} {name!r} matches nothing; " + (f"near are {', '.join(near)}" if near else "nothing is near it"))
