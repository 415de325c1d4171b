"""What finished requests tell about themselves: the ``timings`` object of the API and of ``generate --json``."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.request import DraftStats, Timings


def timings_json(
    stats: Sequence[DraftStats], timings: Sequence[Timings], num_tokens: Sequence[int]
) -> dict[str, float | int]:
    """The ``timings`` object: sums over requests that ran together; rates count from first token to last."""
    total = DraftStats(
        sum(s.rounds for s in stats),
        sum(s.drafted for s in stats),
        sum(s.accepted for s in stats),
        sum(s.committed for s in stats),
    )
    submitted = min((t.submitted for t in timings), default=0.0)
    admitted = min((t.admitted for t in timings if t.admitted is not None), default=submitted)
    first = min((t.first_token for t in timings if t.first_token is not None), default=admitted)
    finished = max((t.finished for t in timings if t.finished is not None), default=first)
    return {
        "draft_rounds": total.rounds,
        "draft_n": total.drafted,
        "draft_n_accepted": total.accepted,
        "acceptance_length": round(total.acceptance_length, 4),
        "tokens_per_s": round(rate(sum(num_tokens) - len(num_tokens), finished - first), 3),
        "queue_ms": round(1000 * (admitted - submitted), 3),
        "time_to_first_token_ms": round(1000 * (first - submitted), 3),
        "generation_ms": round(1000 * (finished - first), 3),
    }


def metrics_json(stats: DraftStats, timings: Timings, num_tokens: int) -> dict[str, object]:
    """One request's ``metrics``, with vLLM's names."""
    first = timings.first_token if timings.first_token is not None else timings.submitted
    admitted = timings.admitted if timings.admitted is not None else timings.submitted
    drafted = stats.drafted
    return {
        "speculative_decoding": {
            "mean_acceptance_length": round(stats.acceptance_length, 4),
            "draft_acceptance_rate": round(stats.accepted / drafted, 4) if drafted else 0.0,
            "num_spec_steps": stats.rounds,
            "num_draft_tokens": drafted,
            "num_accepted_draft_tokens": stats.accepted,
        },
        "queue_time_ms": round(1000 * (admitted - timings.submitted), 3),
        "time_to_first_token_ms": round(1000 * (first - timings.submitted), 3),
        "generation_time_ms": round(1000 * timings.decode_s, 3),
        "mean_itl_ms": round(1000 * timings.decode_s / max(num_tokens - 1, 1), 3),
        "tokens_per_second": round(rate(num_tokens - 1, timings.decode_s), 3),
    }


def rate(count: int, seconds: float) -> float:
    """Per second; 0 where there is nothing to measure."""
    return count / seconds if count > 0 and seconds > 0 else 0.0
