"""Why no test can, or need, notice a change."""

from __future__ import annotations


# By module, line and change, as `Change.key` has them.
REASONS = {
    "checkpoints/content.py: has_ascent = isinstance(run.engine, SAMPa) and run.engine.ascent is not None: "
    "run.engine.ascent is not None -> (run.engine.ascent is None)": (
        "only read for whether the processes differ, which they then do in the other way round"
    ),
    "data/loaders.py: self.batch_sampler, self.seed, self.epoch = batch_sampler, seed, 0: 0 -> 1": (
        "the stream sets the epoch before it reads anything"
    ),
    "engine/ascents.py: self._h: list[Buckets] = [] -> pass": "set before every use; here for its type and for readers",
    "engine/gradients.py: if self.exchange.mesh.world_size == 1:: self.exchange.mesh.world_size == 1 -> False": (
        "one process that compares itself with itself does more work and finds the same"
    ),
    "engine/gradients.py: return self.exchange.gather(row).cpu(), [0]: 0 -> 1": (
        "signatures are compared with one another, and there is one"
    ),
    "engine/lookahead.py: CPU_PIECE, DEVICE_PIECE = 2**18, 2**23: 23 -> 24": (
        "how much a GPU steps at once is a matter of speed; that pieces of any size are right is tested on the CPU"
    ),
    "engine/shared.py: if len(params) == 1 and is_dense(params[0]):: "
    "len(params) == 1 and is_dense(params[0]) -> False": (
        "a large weight is then copied before it is sent: the same bits, more memory"
    ),
    "engine/sharpness_aware.py: return half.numel() > 0 and bool(largest(half.sub(own, alpha=0.5)) > 1e-6 + 1e-4 * largest(half)): "
    "1e-06 -> 2e-06": "a tolerance for rounding, of which only the order of magnitude is meant",
    "engine/sharpness_aware.py: if self.exchange.mesh.world_size > 1:: "
    "self.exchange.mesh.world_size > 1 -> (self.exchange.mesh.world_size >= 1)": (
        "one process that compares itself with itself does more work and finds the same"
    ),
}
