"""The capacity rule, as a model of a run whose parts act in any order."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.orchestrator.pacing import Pace


@dataclass
class Run:
    """A run of the rule: groups are admitted, made by the version of the moment, finish in any order, are trained in
    the order they finished; some die."""

    pace: Pace
    version: int = 0
    admitted: int = 0
    dead: set[int] = field(default_factory=set)
    running: dict[int, int] = field(default_factory=dict)
    queued: list[tuple[int, int]] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)

    @property
    def room(self) -> int:
        oldest = min(self.running.values(), default=None)
        return self.pace.capacity(self.version, oldest, len(self.dead)) - self.admitted

    def admit(self, count: int) -> None:
        for _ in range(min(count, self.room)):
            self.running[self.admitted] = self.version
            self.admitted += 1

    def finish(self, choice: int, dies: bool) -> None:
        if not self.running:
            return
        index = sorted(self.running)[choice % len(self.running)]
        made_by = self.running.pop(index)
        below = sum(other < index for other in self.dead)
        assert made_by >= self.pace.required_step(index, below)
        if dies:
            self.dead.add(index)
        else:
            self.queued.append((index, made_by))

    def train(self) -> None:
        size = self.pace.groups_per_step
        if len(self.queued) < size or self.version == self.pace.steps:
            return
        step, self.queued = self.queued[:size], self.queued[size:]
        self.staleness += [self.version - made_by for _, made_by in step]
        self.trained += [index for index, _ in step]
        self.version += 1


paces = st.builds(Pace, steps=st.integers(1, 6), groups_per_step=st.integers(1, 5), max_staleness=st.integers(0, 3))
events = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(1, 8)),
        st.tuples(st.just("finish"), st.integers(0, 50), st.sampled_from([False, False, False, True])),
        st.tuples(st.just("train")),
    ),
    max_size=150,
)


@settings(max_examples=300, deadline=None)
@given(paces, events)
def test_no_group_is_trained_too_late_and_every_run_can_end(pace, script):
    run = Run(pace)
    for name, *arguments in script:
        getattr(run, name)(*arguments)
        assert run.admitted - len(run.dead) <= pace.steps * pace.groups_per_step
        in_system = len(run.running) + len(run.queued)
        assert in_system <= (1 + pace.max_staleness) * pace.groups_per_step
    # Whatever happened before: from here on the parts just do their work, and the run comes to its end.
    for _ in range(10 * pace.steps * pace.groups_per_step + 10):
        run.admit(1)
        run.finish(0, dies=False)
        run.train()
    assert run.version == pace.steps
    assert len(run.trained) == len(set(run.trained)) == pace.steps * pace.groups_per_step
    assert not run.queued and not run.running
    assert max(run.staleness) <= pace.max_staleness


@given(paces, events)
def test_staleness_zero_is_on_policy(pace, script):
    run = Run(Pace(pace.steps, pace.groups_per_step, 0))
    for name, *arguments in script:
        getattr(run, name)(*arguments)
    assert set(run.staleness) <= {0}


def test_the_rule_uses_what_it_may():
    """The bound is reached, so the rule is no tighter than it must be: all of max_staleness is used."""
    run = Run(Pace(steps=4, groups_per_step=2, max_staleness=2))
    run.admit(100)
    assert run.admitted == 6
    while run.running:
        run.finish(0, dies=False)
    for _ in range(3):
        run.train()
    assert run.staleness == [0, 0, 1, 1, 2, 2]


def test_a_straggler_holds_admission_back():
    pace = Pace(steps=100, groups_per_step=4, max_staleness=1)
    assert pace.capacity(5, None, 0) == 28
    assert pace.capacity(5, 4, 0) == 24
    assert pace.capacity(5, 9, 0) == 28  # waits for a version to come: no reason to run ahead
    assert pace.capacity(5, None, 3) == 31
    assert pace.capacity(100, None, 0) == 400


@given(paces, st.integers(0, 200), st.integers(0, 5), st.integers(0, 5))
def test_what_is_admitted_may_be_made_by_the_version_that_admitted_it(pace, index, version, dead):
    if index < pace.capacity(version, None, dead):
        assert pace.required_step(index, gone_below=dead) <= version
