"""Named sizes of the DiT (paper table 7)."""

from model.config import DiTConfig

PRESETS: dict[str, DiTConfig] = {
    "tiny": DiTConfig(depth=6, width=256, heads=4),
    "li_dit_1b": DiTConfig(depth=28, width=1152, heads=16),
    "li_dit_10b": DiTConfig(depth=48, width=2816, heads=44),
}
"""`tiny` trains on a laptop; without refiners `li_dit_1b` has 0.93B parameters and `li_dit_10b` 9.5B."""
