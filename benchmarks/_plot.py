"""The figures of the calls as a picture."""

from __future__ import annotations

from pathlib import Path

from ._processes import Round
from .cases import IN_FLIGHT

COLOURS = {"asyncio": "#4477aa", "uvloop": "#66ccee", "trio": "#228833"}
NAMES = {"ours": "anyio_kkrpc"}
# Is read on a light page as on a dark one, since nothing is behind it.
TEXT = "#808080"


def plot(medians: dict[tuple[str, str, str], Round], path: Path) -> None:
    """Draw throughput and latency, each on a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        pyplot.rcParams[part] = TEXT
    keys = list(reversed(medians))
    labels = [f"{NAMES.get(name, name)} {kind}".strip() for name, _, kind in keys]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.24 * len(keys) + 1.4), sharey=True)
    for axis, title, values in (
        (axes[0], f"calls/s, {IN_FLIGHT} in flight", [medians[key].in_flight for key in keys]),
        (axes[1], "ms, one call after the other, p50", [medians[key].p50 * 1e3 for key in keys]),
    ):
        bars = axis.barh(range(len(keys)), values, color=[COLOURS[key[1]] for key in keys])
        axis.bar_label(bars, fmt="{:,.3g}" if "ms" in title else "{:,.0f}", padding=2, fontsize=7)
        axis.set_xscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("logarithmic scale", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[0].set_yticks(range(len(keys)), labels, fontsize=8)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes[1].legend(handles=handles, fontsize=8, loc="upper right", framealpha=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110, transparent=True)
