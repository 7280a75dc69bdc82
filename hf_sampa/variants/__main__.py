"""Print the catalogue: `python -m hf_sampa.variants [name ...]`."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from typing import get_type_hints

from . import VARIANTS, Variant, find


WIDTH = 110
TIMINGS = {"sam": "sequential", "sampa": "parallel"}


def parts(variant: Variant) -> str:
    """What the recipe is made of besides SAM's own parts."""
    found = [f"{kind} {type(part).__name__}" for kind, part in variant.recipe({}).changed_parts().items()]
    found += [f"base optimizer with {name}={value}" for name, value in variant.optimizer.items()]
    found += [f"lambda = {variant.lmbda:g}"] if variant.lmbda is not None else []
    return ", ".join(found) or "none: SAM's own"


def timings(variant: Variant) -> str:
    """Values of --method, and why one is missing."""
    names = " and ".join(f"{TIMINGS[method]} (--method {method})" for method in variant.timings)
    return f"{names}; no other, because {variant.why}" if variant.method else names


def arguments(variant: Variant) -> str:
    """Arguments with their defaults and ranges."""
    hints = get_type_hints(variant.make, include_extras=True)
    found = [f"{name}={value} ({hints[name].__metadata__[0]})" for name, value in variant.defaults.items()]
    return ", ".join(found) or "none"


def entry(variant: Variant) -> str:
    """All that the catalogue knows of a variant."""
    facts = {
        "paper": variant.source,
        "parts": parts(variant),
        "arguments": arguments(variant),
        "rho": f"{variant.rho:g}" if variant.rho else "none: it does not perturb",
        "passes": f"forward and backward per step: {variant.passes}",
        "memory": f"in d, besides SAM's: {variant.memory}",
        "timing": timings(variant),
    }
    lines = [f"{variant.name}", *textwrap.wrap(" ".join(inspect.getdoc(variant.make).split()), WIDTH - 2)]
    for name, fact in facts.items():
        lines += textwrap.wrap(f"{name + ':':11}{fact}", WIDTH - 2, subsequent_indent=" " * 11)
    return lines[0] + "\n" + textwrap.indent("\n".join(lines[1:]), "  ")


def main(argv: list[str] | None = None) -> None:
    """Print what `argv`, the process's own by default, asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_sampa.variants",
        description="The sharpness-aware methods that --variant takes. F is a forward pass of the whole batch without a backward, "
        "d the number of trainable weights.",
        epilog="Use one with --variant NAME --variant_args argument=value ..., or "
        "SAMPaTrainingArguments(variant=NAME, variant_args={argument: value}).",
    )
    parser.add_argument("name", nargs="*", help="show these only")
    names = parser.parse_args(argv).name
    try:
        chosen = [find(name) for name in names] or list(VARIANTS.values())
    except ValueError as error:
        parser.error(str(error))
    print("\n\n".join(entry(variant) for variant in chosen))


if __name__ == "__main__":
    main()
