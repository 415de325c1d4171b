"""The guard keeps the faster mode, with rare probes of the other."""

from server.engine.guard import PROBE_EVERY, DraftGuard


def play(drafted_tokens: float, drafted_s: float, plain_s: float, rounds: int, guard: DraftGuard) -> list[bool]:
    chosen = []
    for _ in range(rounds):
        draft = guard.wants_draft(1)
        chosen.append(draft)
        guard.record(1, draft, int(drafted_tokens) if draft else 1, drafted_s if draft else plain_s)
    return chosen


def test_useless_drafting_is_switched_off_and_probed_rarely() -> None:
    guard = DraftGuard()
    play(1, 0.02, 0.01, 60, guard)
    later = play(1, 0.02, 0.01, 1000, guard)
    assert sum(later) / len(later) < 0.15


def test_good_drafting_stays_on_and_probes_cost_little() -> None:
    chosen = play(3, 0.02, 0.01, 1000, DraftGuard())
    assert sum(chosen) / len(chosen) > 0.95


def test_probes_of_slow_drafts_cost_a_twentieth_of_the_time() -> None:
    guard = DraftGuard()
    play(1, 0.1, 0.001, 60, guard)
    later = play(1, 0.1, 0.001, 20_000, guard)
    drafted_s = 0.1 * sum(later)
    assert 0 < drafted_s < 0.051 * (drafted_s + 0.001 * (len(later) - sum(later)))


def test_it_changes_its_mind_when_the_text_changes() -> None:
    guard = DraftGuard()
    play(1, 0.02, 0.01, 200, guard)
    assert not guard.modes[1].drafting
    play(4, 0.02, 0.01, 8 * PROBE_EVERY, guard)
    assert guard.modes[1].drafting


def test_batch_sizes_are_judged_apart() -> None:
    guard = DraftGuard()
    play(1, 0.02, 0.01, 100, guard)
    assert guard.wants_draft(4)
