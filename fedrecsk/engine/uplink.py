"""The way from the clients to the server, where it is not to be trusted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedrecsk.engine.attacks import Attack
from fedrecsk.engine.defences import Defence
from fedrecsk.engine.parallel import ranks
from fedrecsk.engine.uploads import Uploads, UploadSums, add_uploads, screen
from fedrecsk.exceptions import NoUsableUploadError


@dataclass(frozen=True)
class Uplink:
    """What happens to uploads between clients and server.

    Attributes
    ----------
    attack : Attack or None
        What dishonest clients make of theirs.
    defence : Defence or None
        How the server adds up; None adds everything that is not broken.
    """

    attack: Attack | None = None
    defence: Defence | None = None

    def receive(
        self, uploads: Uploads, vectors: Tensor, table: Tensor, t: int
    ) -> tuple[UploadSums, int]:
        """Hand the uploads of a round to the server.

        Parameters
        ----------
        uploads : Uploads
            Of all clients of the round, as honest ones send them.
        vectors : Tensor of shape (C, d)
            Their user vectors, in the columns of the table.
        table : Tensor of shape (n_items, d)
            Before the round.
        t : int
            Number of the round.

        Returns
        -------
        sums : UploadSums
        n_rejected : int
            Clients whose uploads nobody could use.

        Raises
        ------
        NoUsableUploadError
            If that is true of all.
        """
        if ranks().size > 1:
            raise ValueError(
                "attack and defence need all uploads of a round in one place: start one process."
            )
        n_clients = len(uploads.clients)
        if self.attack is not None:
            uploads = self.attack.apply(uploads, vectors, table, t)
        usable = screen(uploads)
        if n_clients and not len(usable.clients):
            raise NoUsableUploadError(n_clients, t)
        add = add_uploads if self.defence is None else self.defence.add
        return add(usable, len(table)), n_clients - len(usable.clients)
