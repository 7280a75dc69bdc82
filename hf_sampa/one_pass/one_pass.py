"""g~_t and g_{t+1} at once: in place of the two passes of `SAMPa._two_gradients`, and with the same numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from ..distributed import Role
from ..engine import Backward, Batch, Buckets, Found, Gradients, Pass, SAMPa
from ..functional import norms
from .halves import Halves, Own
from .meetings import Meetings
from .own import Randomness
from .twins import Twins


logger = logging.getLogger(__name__)

# How far the gradients of the two ways may be apart, relative to their norm, if not more than rounding is different: in single
# precision, which a GPU may cut short, and in half precision.
TOLERANCE, ROUGH = 1e-2, 0.1


class AtTwins(Gradients):
    """Takes gradients at the twins of the trained weights, of which nothing but the gradient is kept."""

    @contextmanager
    def displaced(self, weights: Buckets, keep_statistics: bool = False) -> Iterator[list[Tensor]]:
        with super().displaced(weights) as x:  # what forward changes is seen to by the other half
            yield x


class OnePass:
    """Takes both gradients of a step at once, as soon as they have been seen to be those of two passes in turn.

    The first half is the LOOKAHEAD pass, which is the one whose loss is reported, and the second one the PERTURBED pass.

    Args:
        engine: whose gradients they are.
        own: what else belongs to a half.
        generators: gives random generators besides the global ones that passes seed.
        remember: gives what undoes whatever passes leave on the trainer from then on.
        noted: tells how much of what they leave there is known, and so `own` by halves.
        rough: whether passes compute in half precision, by autocast or with frozen weights that are.

    Attributes:
        on: whether it does.
        why: if not, why.
        exact: whether it gave the same bits as passes in turn, when the two were compared.
    """

    def __init__(
        self,
        engine: SAMPa,
        *,
        own: Sequence[Own] = (),
        generators: Callable[[], list] = list,
        remember: Callable[[], Callable[[], None]] = lambda: lambda: None,
        noted: Callable[[], int] = lambda: 0,
        rough: bool = False,
    ):
        self.engine, self.remember, self.noted = engine, remember, noted
        modules, device = list(engine.forward_state.modules.values()), engine.params[0].device
        self.twins, self.halves = Twins(modules, engine.params), Halves(device)
        self._random, self._generators = Randomness(device), generators
        self.meetings = Meetings(self.halves, self.twins, self._random, modules)
        self.at_twins = AtTwins(
            engine.model,
            engine.trained.at(self.twins.of_half[1]),
            engine.exchange,
            overlap=False,
            unscale=engine.unscale,
            partial_backward=engine.partial_backward,
        )
        self.at_twins.placement = engine.placement
        self._own = [self.twins, self._random, *own]
        self._y, self._g_next = engine.buckets(), engine.buckets()
        self._tolerance = ROUGH if rough else TOLERANCE
        self._tried = self.exact = False
        self.on, self.why = True, ""
        if not (self.meetings.linears or self.meetings.blocks):
            raise ValueError(
                "concurrent: expected a model with frozen linear layers, as one with adapters has them, but all of them are trained: there is "
                "nothing to compute for both gradients at once. Leave concurrent out."
            )
        if not engine.ascents.of_g:
            self._give_up("this variant takes more than two gradients")

    def close(self) -> None:
        """Let go of the twins and of the second half's thread."""
        self.at_twins.close()
        self.halves.close()
        self.engine = None

    # ---- A step ----

    def two_gradients(self, ascent: Pass, batch: Batch, next_batch: Batch, backward: Backward) -> dict[Role, Found]:
        """g~_t and g_{t+1}, which takes the place of g_t."""
        engine = self.engine
        engine.learn(engine.moment)
        engine.perturb(ascent)
        for bucket in range(len(self._y.flats)):
            self._y.ensure(bucket)  # the last pass let it go
        engine.write_lookahead(ascent, self._y)
        passes = self._checked if self._tried else self._on_trial
        found = passes(batch, next_batch, backward)
        engine.ascent_grads.swap(self._g_next, engine.placement.landed)
        return found

    def _at_once(self, batch: Batch, next_batch: Batch, backward: Backward) -> dict[Role, Found]:
        engine, at_twins = self.engine, self.at_twins
        self.twins.begin_alike()
        self._random.others = self._generators()
        at_twins._displacement = engine._displacement
        lookahead = partial(engine.gradient_at, self._y, Role.LOOKAHEAD, next_batch, backward, self._g_next)
        perturbed = partial(
            at_twins.gradient_at, engine.x_tilde, Role.PERTURBED, batch, backward, engine.perturbed_grads
        )
        self.meetings.open()
        try:
            with record_function("SAMPa.at_once"):
                found = self.halves.run(lookahead, perturbed, self._own)
        finally:
            self.meetings.close()
            for twin in at_twins.params:
                twin.grad = None
        return dict(zip((Role.LOOKAHEAD, Role.PERTURBED), found, strict=True))

    def _in_turn(self, batch: Batch, next_batch: Batch, backward: Backward) -> dict[Role, Found]:
        engine = self.engine
        take = engine.gradient_at
        perturbed = take(engine.x_tilde, Role.PERTURBED, batch, backward, engine.perturbed_grads, keep_statistics=True)
        return {
            Role.PERTURBED: perturbed,
            Role.LOOKAHEAD: take(self._y, Role.LOOKAHEAD, next_batch, backward, self._g_next),
        }

    # ---- Trust ----

    def _checked(self, batch: Batch, next_batch: Batch, backward: Backward) -> dict[Role, Found]:
        """At once, or in turn where that has gone wrong in a way that can be seen."""
        kept, undo, noted = self._displaced(), self.remember(), self.noted()
        self.meetings.failed = False
        found = self._at_once(batch, next_batch, backward)
        if self._moving():
            raise RuntimeError(
                "concurrent: expected a forward pass to leave buffers and frozen parameters alone, as it had until now, but it changed "
                f"{self._moving()[0]!r}, at which weights cannot be told. Set concurrent=False. The last checkpoint is not touched by this."
            )
        if not self.meetings.failed and self.noted() == noted:
            return found
        undo()
        self._displace(kept)
        return self._in_turn(batch, next_batch, backward)

    def _on_trial(self, batch: Batch, next_batch: Batch, backward: Backward) -> dict[Role, Found]:
        """In turn, and then at once in each way that there is, until one gives the same."""
        kept = self._displaced()
        in_turn, grads = self._in_turn(batch, next_batch, backward), self._gradients()
        if not all(each.norm.isfinite() for each in in_turn.values()):
            return in_turn  # nothing can be seen: once more in the next step
        if self._moving():
            self._give_up(f"forward changes {self._moving()[0]!r}, as running statistics are")
            return in_turn
        self._tried = True
        for at_blocks in self._ways():
            self.meetings.at_blocks = at_blocks
            self._displace(kept)
            at_once = self._try(batch, next_batch, backward)
            if at_once and self._alike(at_once, self._gradients(), in_turn, grads):
                logger.info("concurrent: both gradients of a step are taken in one pass from here on.")
                return at_once
        self._put_back(grads)
        self._give_up("it gives other gradients")
        return in_turn

    def _ways(self) -> list[bool]:
        """Whether to compute whole blocks for both halves, what is best first. Checkpointing does not keep what is in them."""
        checkpointing = any(getattr(each, "gradient_checkpointing", False) for each in self.engine.model.modules())
        return [True, False] if self.meetings.blocks and not checkpointing else [False]

    def _try(self, batch: Batch, next_batch: Batch, backward: Backward) -> dict[Role, Found] | None:
        undo, self.meetings.failed = self.remember(), False
        try:
            with self.engine.forward_state.kept():
                found = self._at_once(batch, next_batch, backward)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            logger.debug("At once: %s", error)
            return None
        finally:
            undo()
        return None if self.meetings.failed or self._moving() else found

    def _alike(
        self, found: dict[Role, Found], grads: list[Tensor], wanted: dict[Role, Found], others: list[Tensor]
    ) -> bool:
        if any(found[role].used != wanted[role].used for role in Role):
            return False
        self.exact = all(map(torch.equal, grads, others))
        apart = norms([one - other for one, other in zip(grads, others, strict=True)])
        of_losses = max(abs(found[role].loss - wanted[role].loss) / (1 + abs(wanted[role].loss)) for role in Role)
        return bool((apart.norm() <= self._tolerance * norms(others).norm()) & (of_losses <= self._tolerance))

    def _give_up(self, why: str) -> None:
        self.on, self.why = False, why
        logger.warning(
            "concurrent: both gradients of a step cannot be taken in one pass here, because %s. They are taken in turn.",
            why,
        )

    def _moving(self) -> list[str]:
        return sorted(self.engine.forward_state.moving | self.at_twins.forward_state.moving)

    # ---- Copies, which adapters are small enough for ----

    def _displaced(self) -> list[Tensor]:
        """Of x~_t and y_{t+1}, which passes do not leave as they are."""
        return [flat.clone() for flat in (*self.engine.x_tilde.flats, *self._y.flats)]

    def _displace(self, kept: list[Tensor]) -> None:
        self._fill((self.engine.x_tilde, self._y), kept)

    def _gradients(self) -> list[Tensor]:
        return [flat.clone() for flat in (*self.engine.perturbed_grads.flats, *self._g_next.flats)]

    def _put_back(self, grads: list[Tensor]) -> None:
        self._fill((self.engine.perturbed_grads, self._g_next), grads)

    @staticmethod
    def _fill(places: Sequence[Buckets], kept: list[Tensor]) -> None:
        rest = iter(kept)
        for buckets in places:
            for bucket in range(len(buckets.flats)):
                buckets.ensure(bucket)
                buckets.flats[bucket].copy_(next(rest))
