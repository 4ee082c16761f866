"""The names of a run's keys in Redis. The braces put all keys of a run on one node of a Redis cluster."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """`groups` stream of scored groups; `pushed` hash group id -> entry id (`dead` for buried ones, `left_out` for
    unanimous ones); `dead` stream; `left_out` hash group id -> index; `attempts` hash entry id -> `count:token`;
    `lineage` int, and `floor` the lowest one whose groups count (a roll-back sets it); `weights` JSON of the newest
    WeightVersion and `weights_id` its `lineage.version`; `weights_news` the channel it is announced on; of broadcasts
    `weights_offer` and `weights_call` (JSON) and `weights_seats` (hash replica -> JSON); `followers` hash replica ->
    JSON; `specs` hash name -> JSON; `status` hash service -> JSON; `steps` stream of what the trainer measured;
    `commands` list of orders to the trainer, `command_ids` the set of their ids, `commands_obeyed` hash id -> JSON;
    `evaluations` hash version -> JSON; `verdicts` hash id -> JSON of the guard's alarms; `pause` JSON; `samples`
    stream of the last scored groups; `retried` list of indices of dead groups to make again, `retried_letters`
    hash entry id -> index; `room` int, how many more may be asked for."""

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
    def weights_offer(self) -> str:
        return self._key("weights_offer")

    @property
    def weights_seats(self) -> str:
        return self._key("weights_seats")

    @property
    def weights_call(self) -> str:
        return self._key("weights_call")

    @property
    def followers(self) -> str:
        return self._key("followers")

    @property
    def specs(self) -> str:
        return self._key("specs")

    @property
    def status(self) -> str:
        return self._key("status")

    @property
    def floor(self) -> str:
        return self._key("floor")

    @property
    def left_out(self) -> str:
        return self._key("left_out")

    @property
    def steps(self) -> str:
        return self._key("steps")

    @property
    def commands(self) -> str:
        return self._key("commands")

    @property
    def command_ids(self) -> str:
        return self._key("command_ids")

    @property
    def commands_obeyed(self) -> str:
        return self._key("commands_obeyed")

    @property
    def evaluations(self) -> str:
        return self._key("evaluations")

    @property
    def verdicts(self) -> str:
        return self._key("verdicts")

    @property
    def pause(self) -> str:
        return self._key("pause")

    @property
    def samples(self) -> str:
        return self._key("samples")

    @property
    def retried(self) -> str:
        return self._key("retried")

    @property
    def retried_letters(self) -> str:
        return self._key("retried_letters")

    @property
    def room(self) -> str:
        return self._key("room")
