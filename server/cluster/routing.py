"""Which replica a call goes to: its conversation's own, and the next of its list where that one is full."""

from __future__ import annotations

from ray.serve.request_router import MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from server.cluster.call import Call
from server.cluster.conversation import ranking


class ConversationRouter(MultiplexMixin, RequestRouter):
    """Replicas that hold the call's target first, among equals the conversation's own.

    Ray Serve asks each rank in turn whether it takes the call, so a full replica is passed over. Calls are not put in
    order among each other: one that waits for its replica holds up no other.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas, best first, each a rank of its own; calls without a conversation are spread evenly."""
        if pending_request is None or not isinstance(pending_request.args[0], Call):
            return [candidate_replicas]
        call: Call = pending_request.args[0]
        groups = self.rank_replicas_via_multiplex(candidate_replicas, call.target)
        ranks: list[list[RunningReplica]] = []
        for group in groups:
            named = {replica.replica_id.unique_id: replica for replica in group}
            ranks += [[named[name]] for name in ranking(call.conversation, named)]
        return ranks
