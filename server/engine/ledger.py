"""What each stage of drafting cost and brought, in seconds: one that loses may lose a hundredth of the time. Pure.

Expectations can be wrong, and what was learnt fades so that a drafter is tried again in time. The ledger bounds what
all such trials may cost: drafting and the rows of its drafts are spent, what a token takes of late is earned for each
that is accepted, and a stage that owes more than its share rests until time has paid for it. The rule is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.acceptance import Accepted
from server.engine.calibration import DRAFTER, FORCED, LOOKUP
from server.engine.candidates import Candidates
from server.engine.cost import Costs, Spent

ALLOWANCE = 0.01  # of all time
CREDIT_ROUNDS = 4  # what a stage may lose before it must have earned, in plain rounds


@dataclass
class Stage:
    """A stage's account. debt_s: seconds lost beyond its allowance, below 0 where credit is left, None at the start.
    The rest is of the current round: drafts that only this stage made, those accepted, and seconds of drafting."""

    debt_s: float | None = None
    nodes: int = 0
    accepted: int = 0
    draft_s: float = 0.0


@dataclass
class Ledger:
    """The accounts of the stages."""

    stages: dict[str, Stage] = field(default_factory=lambda: {stage: Stage() for stage in (DRAFTER, LOOKUP, FORCED)})

    def may_draft(self, stage: str) -> bool:
        """Whether the stage may cost anything now."""
        debt_s = self.stages[stage].debt_s
        return debt_s is None or debt_s <= 0

    @property
    def drafter_worked(self) -> bool:
        """Whether the drafter took any time in this round or before it."""
        return self.stages[DRAFTER].draft_s > 0

    def drafted(self, stage: str, seconds: float) -> None:
        """So long took drafting, in this round or before it."""
        self.stages[stage].draft_s += seconds

    def verified(self, drafts: Candidates, accepted: Accepted) -> None:
        """What became of one request's drafts; those that several stages made cost none of them anything."""
        path = set(accepted.rows)
        for row, draft in enumerate(drafts.drafts, 1):
            stages = {cell.stage for cell, _ in draft.cells}
            if len(stages) == 1:
                account = self.stages[stages.pop()]
                account.nodes += 1
                account.accepted += row in path

    def close(self, costs: Costs, spent: Spent) -> None:
        """A round has ended."""
        token_s = costs.token_s(spent.num_requests)
        least = -CREDIT_ROUNDS * costs.plain_s(spent.num_requests)
        verify_s = costs.verify.seconds(spent.rows)
        for account in self.stages.values():
            extra_s = verify_s - costs.verify.seconds(spent.rows - account.nodes) if account.nodes else 0.0
            slowing_s = costs.verify.slowing_s(spent.rows) if account.draft_s else 0.0
            lost_s = account.draft_s + extra_s + slowing_s - account.accepted * token_s
            before = least if account.debt_s is None else account.debt_s
            account.debt_s = max(before + lost_s - ALLOWANCE * (spent.verify_s + spent.other_s), least)
            account.nodes, account.accepted, account.draft_s = 0, 0, 0.0
