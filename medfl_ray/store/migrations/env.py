"""What alembic runs: the migrations, inside the transaction that store/database.py has open."""

from __future__ import annotations

from alembic import context

from medfl_ray.store.tables import registry_metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=registry_metadata)
context.run_migrations()
