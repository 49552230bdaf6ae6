"""Who may be on the devices. With `placement.offload: idle` groups take turns: memory peaks at the largest phase, not at the sum.

A step's turns, with what stays on the devices meanwhile; all else rests::

    generate                     whoever samples: the weights it samples with
    score                        reference, reward, value, policy, one after the other: weights
    train                        policy, then value: weights, gradients, optimiser state
    sync                         policy, and the rollout group where there is one: weights

A worker brings back by itself what a call needs; here it is only said who leaves. A call of a group begins when those before it are done,
so a group that is told to rest finishes first, and whoever asked waits for it: the turns never overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_dist.contracts.group import WorkerGroup
from rlhf_dist.contracts.roles import Needs, RestInfo, RestingRole


class Turns:
    """Turns of groups that share devices; `turn(group, needs=…)` begins one. Without groups nobody ever rests, and a turn means nothing.

    Args:
        groups: all that take part. What they hold at first is not known.
    """

    def __init__(self, groups: Sequence[WorkerGroup] = ()) -> None:
        self._groups = groups
        self._needs: dict[str, Needs] = {group.name: "training" for group in groups}
        self._infos: dict[str, list[RestInfo]] = {}
        self._most, self._told = 0, 0.0

    @property
    def taken(self) -> bool:
        """Whether groups take turns at all."""
        return bool(self._groups)

    @property
    def stays(self) -> list[str]:
        """What cannot leave its device, in words."""
        return sorted({info.stays for infos in self._infos.values() for info in infos} - {""})

    def __call__(self, *groups: WorkerGroup, needs: Needs = "weights") -> None:
        """The turn of some groups, or of none. Waits until all others have done what they were asked, and have left."""
        if not self.taken:
            return
        turn: dict[str, Needs] = {group.name: needs if group in groups else "nothing" for group in self._groups}
        leaving = [group for group in self._groups if self._needs[group.name] not in ("nothing", turn[group.name])]
        asked = [(group, group.submit(RestingRole.rest, [(turn[group.name],)] * group.world_size)) for group in leaving]
        for group, handles in asked:
            self._infos[group.name] = group.collect(handles)
        self._needs = turn
        self._most = max(self._most, self._away(turn))

    def forget(self) -> None:
        """Groups were started anew: what they hold is not known."""
        self._needs = dict.fromkeys(self._needs, "training")

    def metrics(self) -> dict[str, float]:
        """Since the last look, `offload/bytes`: the most that was off the devices at one time, over all ranks; `offload/seconds`: spent on
        leaving and coming back, the ranks of a group side by side. Empty where nobody takes turns."""
        if not self.taken:
            return {}
        seconds = sum(max(info.seconds for info in infos) for infos in self._infos.values())
        found = {"offload/bytes": float(self._most), "offload/seconds": seconds - self._told}
        self._most, self._told = self._away(self._needs), seconds
        return found

    def _away(self, needs: Mapping[str, Needs]) -> int:
        """Bytes off the devices during a turn, in which the needed parts come back."""
        return sum(
            info.training * (needs[name] != "training") + info.weights * (needs[name] == "nothing")
            for name, infos in self._infos.items()
            for info in infos
        )
