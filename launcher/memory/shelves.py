"""Which saves in memory are whole, and on which hosts: what the supervisor knows of all agents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distui.launcher.cluster.gang import Member
from distui.proto import cluster_pb2 as pb


@dataclass(slots=True)
class _Save:
    facts: pb.SaveFacts
    held: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    """By node, and how often its agent was lost before: the ranks whose files it has, its own or copies."""
    own: set[int] = field(default_factory=set)
    """Ranks that have handed over."""
    pending: set[int] = field(default_factory=set)
    """Nodes that copy theirs to a partner."""

    def is_whole(self) -> bool:
        return set().union(*self.held.values()) >= set(range(self.facts.world_size))


class Shelves:
    """The saves that agents keep. Nodes are numbered as in the job."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._saves: dict[str, _Save] = {}

    def kept(self, node: int, told: pb.Kept) -> bool:
        """Take in what an agent keeps; tell whether the save is now kept by all, so that older ones are not needed."""
        save = self._saves.setdefault(told.save.save, _Save(told.save))
        save.held.setdefault((node, self._members[node].losses), set()).update(told.save.ranks)
        if told.copy:
            return False  # the host whose copy it is tells when all of it is there
        save.own.update(told.save.ranks)
        (save.pending.add if told.pending else save.pending.discard)(node)
        if save.pending or len(save.own) < save.facts.world_size:
            return False
        step = save.facts.step
        self._saves = {name: one for name, one in self._saves.items() if one.facts.step >= step}
        return True

    def newest(self) -> str:
        """Return the newest save of which agents have all ranks' files; "" without one. Others are forgotten."""
        there = {(one.node, one.losses) for one in self._members if one.here}
        for save in self._saves.values():
            save.held = {agent: ranks for agent, ranks in save.held.items() if agent in there}
        whole = {name: save for name, save in self._saves.items() if save.is_whole()}
        chosen = max(whole, key=lambda name: whole[name].facts.step, default="")
        self._saves = {chosen: whole[chosen]} if chosen else {}
        return chosen

    def step(self, save: str) -> int | None:
        """Return the step of a save that is known; None for ""."""
        return int(self._saves[save].facts.step) if save else None

    def add_to(self, start: pb.Start, node: int, partner: int | None, save: str) -> None:
        """Say to an agent what its ranks go on from, and who has copies of what it keeps."""
        addresses = {one.node: one.hello.keeps_at for one in self._members if one.here and one.hello is not None}
        start.partner = addresses.get(partner, "") if partner is not None else ""
        if save:
            start.restore.CopyFrom(self._restore(save, node, addresses))

    def _restore(self, save: str, node: int, addresses: Mapping[int, str]) -> pb.Restore:
        """Return who has what `node` lacks of a save. `addresses` are those of agents' ports."""
        known = self._saves[save]
        own = known.held.get((node, self._members[node].losses), set())
        told, lacks = pb.Restore(save=known.facts), set(range(known.facts.world_size)) - own
        for (holder, _), ranks in sorted(known.held.items()):
            if holder != node and (taken := ranks & lacks):
                told.holders.add(address=addresses[holder], ranks=sorted(taken))
                lacks -= taken
        return told
