"""What SAMPa costs as the work grows: step_time.py's ratios for deeper models and for longer sequences.

    python benchmarks/scaling.py                                # 2, 6 and 12 layers; 8, 32 and 128 tokens per sequence
    python benchmarks/scaling.py --layers 2 6 --seq 8 --rounds 3 --output_dir out/scaling
    python benchmarks/scaling.py --from_json scaling/scaling.json --output_dir .       # draw the picture once more

The number of layers changes with the longest sequences, the length of the sequences with the middle number of layers.
Prints a table, with the median and the range of each ratio over the rounds, and writes scaling.json and scaling.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from step_time import SIZES, add_size, check_sizes, count_rounds, measure
from tqdm import tqdm


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


RATIOS = {"sampa_over_adamw": "SAMPa / AdamW", "sam_over_adamw": "SAM / AdamW", "sam_over_sampa": "SAM / SAMPa"}
# The two that are drawn; colours as in the demo.
COLORS = {"sampa_over_adamw": "#0072B2", "sam_over_adamw": "#E69F00"}
AXES = {"layers": "layers", "seq": "tokens per sequence"}


def make_grid(layers: list[int], seq: list[int]) -> list[dict[str, int]]:
    """Both lines through the grid, as settings of step_time.measure; the point where they cross comes once."""
    layers, seq = sorted(set(layers)), sorted(set(seq))
    crossing = {"layers": layers[len(layers) // 2], "seq": seq[-1]}
    points = [{**crossing, "layers": value} for value in layers] + [{**crossing, "seq": value} for value in seq]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def measure_grid(grid: list[dict[str, int]], common: dict[str, Any]) -> dict[str, Any]:
    """All points, one after the other; ready for JSON."""
    points = []
    with tqdm(total=len(grid) * count_rounds(common), unit="round") as bar:
        for point in grid:

            def tell(line: str, at: str = f"{point['layers']} layers, {point['seq']} tokens") -> None:
                bar.set_postfix_str(f"{at}, {line}", refresh=False)
                bar.update()

            result = measure({**common, **point}, tell=tell)
            seconds = {method: figures["seconds_per_step"] for method, figures in result["methods"].items()}
            ratios = {name: result["ratios_by_round"][name] for name in RATIOS}
            points.append({**point, "parameters": result["parameters"], "seconds_per_step": seconds, **ratios})
    return {"settings": common, "points": points}


def format_table(result: dict[str, Any]) -> str:
    """One line per point; of each ratio the median and, in brackets, the range over the rounds."""
    header = f"{'layers':>6}{'tokens':>8}{'weights':>10}{'AdamW s/step':>14}"
    lines = [describe(result["settings"]), "", header + "".join(f"{name:>22}" for name in RATIOS.values())]
    for point in result["points"]:
        cells = [f"{median(point[r]):.2f} ({min(point[r]):.2f} - {max(point[r]):.2f})" for r in RATIOS]
        lines.append(
            f"{point['layers']:>6}{point['seq']:>8}{point['parameters'] / 1e6:>8.1f} M"
            f"{point['seconds_per_step']['adamw']:>14.3f}" + "".join(f"{cell:>22}" for cell in cells)
        )
    return "\n".join(lines)


def describe(settings: dict[str, Any]) -> str:
    """What is the same at all points."""
    return (
        f"BERT of {settings['hidden']} units, {settings['batch']} sequences per process and step, two processes with one "
        f"CPU thread each;\nmedian and range of {settings['rounds']} interleaved rounds of {settings['steps']} steps, "
        f"{'bf16 autocast' if settings['bf16'] else 'fp32'}"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Two panels, by layers and by tokens per sequence: seconds per step against AdamW's."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    points = result["points"]
    # The longest sequences are those at which the number of layers changes, and the other way round.
    longest = max(point["seq"] for point in points)
    depth = next((point["layers"] for point in points if point["seq"] != longest), points[0]["layers"])
    by_layers = [point for point in points if point["seq"] == longest]
    by_seq = [point for point in points if point["layers"] == depth]
    draw_panel(panels[0], by_layers, "layers", f"{longest} tokens per sequence")
    draw_panel(panels[1], by_seq, "seq", f"{depth} layers")
    panels[0].set_ylabel("seconds per step / AdamW's")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False, loc="lower right")
    figure.suptitle(f"What a step costs as the work grows. {describe(result['settings'])}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_panel(axes, points: list[dict[str, Any]], key: str, title: str) -> None:
    """Medians as lines, ranges over the rounds as bars, AdamW as a dashed line."""
    points = sorted(points, key=lambda point: point[key])
    places = [point[key] for point in points]
    for ratio, color in COLORS.items():
        middle = [median(point[ratio]) for point in points]
        below = [m - min(point[ratio]) for m, point in zip(middle, points, strict=True)]
        above = [max(point[ratio]) - m for m, point in zip(middle, points, strict=True)]
        axes.errorbar(places, middle, yerr=(below, above), label=RATIOS[ratio], color=color, marker="o", capsize=4)
    axes.axhline(1.0, color="#999999", linestyle="--", label="AdamW")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=AXES[key], title=title)
    axes.spines[["top", "right"]].set_visible(False)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[2, 6, 12], help="layers of the BERTs (default 2 6 12)"
    )
    parser.add_argument(
        "--seq", type=int, nargs="+", default=[8, 32, 128], help="tokens (default 8 32 128, at most 512)"
    )
    for name in ("hidden", "batch", "rounds", "steps"):
        add_size(parser, name)
    parser.add_argument("--bf16", action="store_true", help="forward passes under bf16 autocast")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/scaling"), help="folder of scaling.json and scaling.png"
    )
    parser.add_argument("--from_json", type=Path, help="measure nothing, show these figures of an earlier run")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    common = {name: getattr(args, name) for name in ("hidden", "batch", "rounds", "steps", "bf16")}
    grid = make_grid(args.layers, args.seq)
    for point in grid:
        check_sizes(parser, {name: {**common, **point}[name] for name in SIZES})
    if args.from_json and not args.from_json.is_file():
        parser.error(f"--from_json expects the scaling.json of an earlier run, but {args.from_json} is no file")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.from_json:
        result = json.loads(args.from_json.read_text())
    else:
        result = measure_grid(grid, common)
        (args.output_dir / "scaling.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, args.output_dir / "scaling.png")
    print(f"{format_table(result)}\n\nPicture: {args.output_dir / 'scaling.png'}")


if __name__ == "__main__":
    main()
