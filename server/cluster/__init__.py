"""Past one machine: the same ASGI app under Ray Serve, in as many replicas as there are machines (extra ``ray``)."""
