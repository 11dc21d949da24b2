"""Named sizes of the DiT (paper table 7)."""

from model.config import DiTConfig

PRESETS: dict[str, DiTConfig] = {
    "tiny": DiTConfig(depth=6, width=256, heads=4),
    "li_dit_1b": DiTConfig(depth=28, width=1152, heads=16),
    "li_dit_1b_18x64": DiTConfig(depth=28, width=1152, heads=18),
    "li_dit_1b_9x128": DiTConfig(depth=28, width=1152, heads=9),
    "li_dit_10b": DiTConfig(depth=48, width=2816, heads=44),
}
"""`tiny` trains on a laptop; without refiners `li_dit_1b` has 0.93B parameters and `li_dit_10b` 9.5B.

The paper's 1B has 16 heads of 72 channels, which attention kernels run as 96 or 128. 18 heads of 64, or 9 of
128, have the same matrices and FLOPs."""
