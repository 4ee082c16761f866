"""The names of a run's keys in Redis. The braces put all keys of a run on one node of a Redis cluster."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """`groups` stream of scored groups; `pushed` hash group id -> entry id (`dead` for buried ones); `dead` stream;
    `attempts` hash entry id -> `count:token`; `lineage` int; `weights` JSON of the newest WeightVersion and
    `weights_id` its `lineage.version`; `weights_news` the channel it is announced on; `followers` hash replica -> JSON;
    `specs` hash name -> JSON; `status` hash service -> JSON."""

    run_id: str

    def _key(self, name: str) -> str:
        return f"rlif:{{{self.run_id}}}:{name}"

    @property
    def groups(self) -> str:
        return self._key("groups")

    @property
    def pushed(self) -> str:
        return self._key("pushed")

    @property
    def dead(self) -> str:
        return self._key("dead")

    @property
    def attempts(self) -> str:
        return self._key("attempts")

    @property
    def lineage(self) -> str:
        return self._key("lineage")

    @property
    def weights(self) -> str:
        return self._key("weights")

    @property
    def weights_id(self) -> str:
        return self._key("weights_id")

    @property
    def weights_news(self) -> str:
        return self._key("weights_news")

    @property
    def followers(self) -> str:
        return self._key("followers")

    @property
    def specs(self) -> str:
        return self._key("specs")

    @property
    def status(self) -> str:
        return self._key("status")
