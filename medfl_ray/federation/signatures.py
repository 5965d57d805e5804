"""What a hospital signs when it sends an update, so that nobody can send one in its name or alter it on its way."""

from __future__ import annotations

import hashlib
import json

from medfl_ray.messages import ClientUpdate

_CONTEXT = "medfl-ray update v1"


def update_digest(job: str, update: ClientUpdate, delta_checksum: str) -> str:
    """Return the SHA-256, in hex, of what an update claims: whose it is, for which round, and its values.

    Args:
      delta_checksum: `params.checksum` of the update's delta.
    """
    claims = [
        _CONTEXT,
        job,
        update.round,
        update.attempt,
        update.hospital,
        update.aggregation_weight,
        update.num_steps,
        update.layout_checksum,
        delta_checksum,
    ]
    return hashlib.sha256(json.dumps(claims, separators=(",", ":")).encode()).hexdigest()
