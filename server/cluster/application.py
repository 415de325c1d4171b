"""``serve run server.cluster.application:application``: what Ray Serve is to run, from a few arguments."""
# No postponed annotations: Ray Serve reads the builder's to check what it is given.

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.api.access import Access
from server.api.errors import ApiError
from server.api.gate import Gate
from server.cluster.edge import Edge
from server.cluster.replica import holding
from server.cluster.routing import ConversationRouter
from server.settings import Settings, SettingsError, load_settings, parse_list

MAX_EDGE_REQUESTS = 1000


class Cluster(BaseModel):
    """What is served, and on how many machines. Errors: pydantic's, which name the argument."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Path | None = Field(None, description="Settings of every replica, as of `dovetail serve --config`.")
    targets: Annotated[tuple[str, ...], BeforeValidator(parse_list)] = Field(
        (), description="Several targets, by comma; nothing: the settings' own."
    )
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    edges: int = Field(1, ge=1, description="Processes that requests come in by.")
    replicas_per_machine: int = Field(1, ge=1, description="A replica takes all cores unless `threads` says less.")
    targets_per_replica: int = Field(1, ge=1, description="Targets that a replica holds at once.")
    cpus_per_replica: float = Field(1, ge=0, description="What Ray is to reckon a replica with.")

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


def application(cluster: Cluster) -> Application:
    """The edge and the replicas behind it. Errors: SettingsError."""
    settings = load_settings({}, cluster.config)
    if settings.tls_cert is not None:
        raise SettingsError("tls_cert: Ray Serve's proxy answers here; end TLS before it")
    targets = settings_by_name(settings, cluster.targets)
    slots = max(each.max_seqs for each in targets.values())
    replicas = serve.deployment(
        holding(cluster.targets_per_replica),
        name="Replica",
        # Those that wait stay at the edge, where they can still go to another replica.
        max_ongoing_requests=2 * slots,
        max_queued_requests=settings.max_waiting,
        max_replicas_per_node=cluster.replicas_per_machine,
        autoscaling_config=AutoscalingConfig(
            min_replicas=cluster.min_replicas, max_replicas=cluster.max_replicas, target_ongoing_requests=slots
        ),
        ray_actor_options={"num_cpus": cluster.cpus_per_replica},
        graceful_shutdown_timeout_s=settings.drain_s,
        request_router_config=RequestRouterConfig(request_router_class=ConversationRouter),
    )
    edge = serve.deployment(
        serve.ingress()(EdgeDeployment),
        name="Edge",
        num_replicas=cluster.edges,
        max_ongoing_requests=MAX_EDGE_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    bound: Application = edge.bind(replicas.bind(targets), settings, tuple(targets))
    return bound


class EdgeDeployment:
    """The edge as Ray Serve starts it."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings, targets: tuple[str, ...]) -> None:
        self.edge = Edge(replicas, targets)
        self.access = Access(settings)

    def __serve_build_asgi_app__(self) -> Any:
        """Called behind the constructor."""
        return Starlette(
            routes=[Route("/{path:path}", self.edge)],
            middleware=[Middleware(Gate, access=self.access)],
            exception_handlers={ApiError: refused},
        )


async def refused(_: Request, error: Exception) -> Response:
    """What the edge itself refuses."""
    assert isinstance(error, ApiError)
    return error.response()


def settings_by_name(settings: Settings, targets: tuple[str, ...]) -> dict[str, Settings]:
    """Each target's settings by the name it is served under. Callers' limits are the edge's. Errors: SettingsError."""
    # Whatever name a request came by: a replica is reached through Ray alone.
    common = {"host": "0.0.0.0", "rate_limit": None, "max_per_key": None}
    if not targets:
        return {settings.served_name: settings.model_copy(update=common)}
    each = [settings.model_copy(update=common | {"target": name, "model_name": None}) for name in targets]
    named = {one.served_name: one for one in each}
    if len(named) < len(targets):
        raise SettingsError(f"targets: two of {', '.join(targets)} would be served under one name")
    return named
