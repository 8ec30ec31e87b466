"""The store: everything that must survive, and the only place where services and controller meet.

    store.sites   the registry: invitations, certificates, who was seen when
    store.work    what agents do: lease, heartbeat, finish
    store.uploads which blobs a caller may know of
    store.jobs    what the controller does: facts in, transitions out; and the operator's orders
    store.views   what the operator may look at
    store.base_models which base models sites may fetch

All methods are synchronous and safe to call from any thread; async code calls them through asyncio.to_thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.base_models import BaseModels
from coordinator.storage.database import Database
from coordinator.storage.jobs import Jobs
from coordinator.storage.sites import Sites
from coordinator.storage.uploads import Uploads
from coordinator.storage.views import Views
from coordinator.storage.work import Work


@dataclass(frozen=True)
class Store:
    database: Database
    sites: Sites
    work: Work
    uploads: Uploads
    jobs: Jobs
    views: Views
    base_models: BaseModels

    @staticmethod
    def open(url: str) -> Store:
        """Opens and migrates the database at `url`, for example sqlite:////var/lib/silotune/coordinator.db."""
        database = Database.open(url)
        return Store(
            database, Sites(database), Work(database), Uploads(database), Jobs(database), Views(database),
            BaseModels(database),
        )  # fmt: skip

    def close(self) -> None:
        self.database.close()
