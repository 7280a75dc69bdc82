"""Why no test can, or need, notice a change."""

REASONS: dict[str, str] = {}
