"""The way from the clients to the server, where it is not to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedrecsk.engine.attacks import Attack
from fedrecsk.engine.compression import Compression
from fedrecsk.engine.defences import Defence
from fedrecsk.engine.parallel import ranks
from fedrecsk.engine.privacy import Privacy, Release
from fedrecsk.engine.secure_sum import SecureSum
from fedrecsk.engine.uploads import (
    Meaning,
    Residual,
    Uploads,
    UploadSums,
    add_uploads,
    finite,
    screen,
)
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
    compression : Compression or None
        How clients make their uploads smaller.
    secure_sum : SecureSum or None
        How clients add up themselves, so that the server sees sums alone; leaves no room for
        compression or a defence.
    privacy : Privacy or None
        How uploads are shortened and noised before anybody may look at their sums. It takes the
        place of a defence: what a defence does to one upload depends on the others, so one client
        could change the sums by more than its own upload.
    """

    attack: Attack | None = None
    defence: Defence | None = None
    compression: Compression | None = None
    secure_sum: SecureSum | None = None
    privacy: Privacy | None = None

    def takes(self, n_clients: int) -> bool:
        """Say whether so many clients can send something.

        Nobody cannot, nor one whose upload would be the sum that it is to be hidden in.
        """
        return n_clients > (self.secure_sum is not None)

    def receive(
        self,
        uploads: Uploads,
        vectors: Tensor,
        table: Tensor,
        t: int,
        residual: Residual | None = None,
        meaning: Meaning | None = None,
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
        residual : Residual, optional
            What clients have kept in earlier rounds.
        meaning : Meaning, optional
            Of the uploads. With a defence that checks, those that mean nothing are dropped, unless
            clients compress, which blurs what they send.

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
        n_clients, (n_items, width) = len(uploads.clients), table.shape
        uploads = self._sent(uploads, vectors, table, t, meaning)
        if self.secure_sum is not None:
            summed = self.secure_sum.add(uploads, n_items, width, t)
            return summed, n_clients - len(summed.clients)
        n_bytes = None
        if self.compression is not None:
            uploads, residual, n_bytes = self.compression.apply(
                uploads, residual, n_items, width, t
            )
        usable = screen(uploads)
        checks = self.defence is not None and self.defence.checks and self.compression is None
        if checks and meaning is not None:
            usable = usable.of(meaning.holds(usable))
        if n_clients and not len(usable.clients):
            raise NoUsableUploadError(n_clients, t)
        add = add_uploads if self.defence is None else self.defence.add
        sums = replace(add(usable, n_items), bytes_up=n_bytes, residual=residual)
        return sums, n_clients - len(usable.clients)

    def release(
        self,
        uploads: Uploads,
        vectors: Tensor,
        table: Tensor,
        t: int,
        *,
        widths: Sequence[int],
        bounds: Tensor,
        n_clients: int,
    ) -> tuple[Release, int]:
        """Hand the uploads of a round to the server with privacy.

        Parameters
        ----------
        uploads, vectors, table, t
            As in `receive`.
        widths, bounds, n_clients
            See `Privacy.add`.

        Returns
        -------
        release : Release
        n_rejected : int
            Clients that sent what is not finite, of whom nothing is added. That nobody is left is
            no error: it would tell of all of them.
        """
        assert self.privacy is not None
        usable = finite(self._sent(uploads, vectors, table, t))
        release = self.privacy.add(usable, len(table), widths, bounds, t, n_clients)
        return release, len(uploads.clients) - len(usable.clients)

    def _sent(
        self,
        uploads: Uploads,
        vectors: Tensor,
        table: Tensor,
        t: int,
        meaning: Meaning | None = None,
    ) -> Uploads:
        """Let dishonest clients send what they want."""
        if ranks().size > 1:
            raise ValueError(
                "attack, defence, compression, secure_aggregation and privacy need all uploads of "
                "a round in one place: start one process."
            )
        if self.attack is None or not len(uploads.clients):
            return uploads
        return self.attack.apply(uploads, vectors, table, t, meaning)
