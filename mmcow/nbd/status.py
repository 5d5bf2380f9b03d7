# SPDX-License-Identifier: MIT
"""What a server tells of itself, JSON-ready: for the control socket and for programs.

Owns: the keys and what they mean (docs/cli.md lists them).
Never: changes anything.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import mmcow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mmcow.nbd.export import Export
    from mmcow.nbd.server import Server


def status_of(server: Server, exports: Iterable[Export]) -> dict[str, Any]:
    """The server, and these of its exports."""
    return {
        "version": mmcow.__version__,
        "connections": len(server.connections),
        "exports": [_describe(export) for export in exports],
    }


def activity_of(server: Server) -> dict[str, Any]:
    """What changes from moment to moment, at no cost."""
    return {
        "connections": len(server.connections),
        "exports": [
            {
                "name": export.name,
                "throughput": export.counters.throughput(),
                "stream": None if export.stream is None else export.stream.status(),
            }
            for export in server.exports.values()
        ],
    }


def _describe(export: Export) -> dict[str, Any]:
    image, counters = export.image, export.counters
    top = image.engine.top
    return {
        "name": export.name,
        "path": image.path,
        "size": image.size,
        "read-only": export.read_only,
        "connections": export.connections,
        "queue": image.image.queue_backend,
        "chain": [f"{layer.path} ({layer.format})" for layer in image.chain],
        "cluster-size": top.info.cluster_size,
        "allocated-clusters": top.allocated(),
        "total-clusters": -(-top.info.size // top.info.cluster_size),
        "uptime": round(time.monotonic() - counters.started, 3),
        "operations": dict(counters.operations),
        "bytes": dict(counters.bytes),
        "throughput": counters.throughput(),
        "errors": counters.errors,
        # Bucket n counts requests that took less than 2^n microseconds (and not less than half).
        "latency-log2-us": list(counters.latency),
        "stream": None if export.stream is None else export.stream.status(),
    }
