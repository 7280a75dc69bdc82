"""From rows of runs to the sections of a report."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import pictures
from .choosing import ratios
from .config import Arguments, Comparison, as_text
from .figures import Mean, difference, mean, over_tasks, smallest_probability
from .pictures import Look
from .report import Picture, Section, Table
from .runs import CHOOSE, SCORE


Rows = Sequence[Mapping[str, Any]]


class Findings:
    """What there is to say of a comparison.

    Args:
        comparison: what was compared.
        rows: of all runs that are done.
        chosen: settings by task and method; see `choosing.settings`.
        longer: further names for the first method, with how many times its epochs; see `choosing.longer`.
        seconds: per step, by method, a value for each round.
        problems: runs that failed, and what else could not be done, in words.
        folder: of the pictures, and of the runs.
        landscape: from `landscape.measure`.
    """

    def __init__(
        self,
        comparison: Comparison,
        rows: Rows,
        chosen: Mapping[tuple[str, str], Arguments],
        longer: Mapping[str, float],
        seconds: Mapping[str, list[float]],
        problems: Sequence[str],
        folder: Path,
        landscape: Mapping[str, Any] | None = None,
    ):
        self.comparison, self.chosen, self.longer, self.seconds = comparison, chosen, longer, seconds
        self.problems = problems
        self.folder, self.landscape = folder, landscape
        self.scored = [row for row in rows if row["phase"] == SCORE and row["score"] is not None]
        self.tried = [row for row in rows if row["phase"] == CHOOSE and row["score"] is not None]
        self.methods = [*comparison.methods, *longer]
        self.tasks = [task for task in comparison.tasks if any(row["task"] == task for row in self.scored)]
        self.look = Look(self.methods)
        every = [row["score"] for row in (*self.scored, *self.tried)]
        less = any(map(comparison.is_less_better, comparison.tasks))
        # Shares are read as percentages.
        self.percent = bool(every) and not less and all(-1 <= each <= 1 for each in every)
        metrics = dict.fromkeys(comparison.metrics.values())
        self.unit = (
            f"{' or '.join(name.removeprefix('eval_').replace('_', ' ') for name in metrics)}{', %' * self.percent}"
        )

    def sections(self) -> list[Section]:
        parts = [
            self._what,
            self._scores,
            self._paper,
            self._times,
            self._sharpness,
            self._landscape,
            self._chosen,
            self._failures,
        ]
        return [section for part in parts if (section := part()) is not None]

    # ---- Text ----

    def _what(self) -> Section:
        """What was run, with what."""
        comparison = self.comparison
        count = len(comparison.seeds)
        lines = [
            f"{comparison.script.name} with {len(comparison.methods)} methods on {len(comparison.tasks)} "
            f"task{'s' * (len(comparison.tasks) > 1)}, {count} seed{'s' * (count > 1)} each: {len(self.scored)} runs that are scored. "
            + (
                f"**The methods differ in {', '.join(comparison.uneven)}**, so that they do not make the same updates."
                if comparison.uneven
                else "Every method makes the same number of updates, each on a batch of the same size"
                + (", but for those that are named by a time." if self.longer else ".")
            ),
            f"Arguments of all runs: {as_text(comparison.arguments)}",
        ]
        names = ("python", "torch", "transformers", "accelerate")
        for commit, *versions in dict.fromkeys((row["commit"], *(row[name] for name in names)) for row in self.scored):
            said = ", ".join(
                f"{name.capitalize() if name == 'python' else name} {each}"
                for name, each in zip(names, versions, strict=True)
            )
            lines.append(f"Commit {commit or 'not known'}, {said}.")
        rows = [[name, as_text(own)] for name, own in comparison.methods.items()]
        rows += [
            [name, f"as {comparison.first}, with {factor:g} times its epochs"] for name, factor in self.longer.items()
        ]
        return Section("What was compared", "\n".join(lines), [Table(["method", "arguments"], rows)])

    def _scores(self) -> Section | None:
        if not self.scored:
            return Section("Scores", "No run that is scored is done.")
        means = self._by_task("score")
        rows, differences = [], []
        for method in self.methods:
            if any(method in means[task] for task in self.tasks):
                rows.append([method, *self._cells(means, method), self._average(means, method)])
        for method in self.methods[1:]:
            found = {task: self._difference(task, method) for task in self.tasks}
            if any(found.values()):
                differences.append(
                    [method, *(self._change(found[task]) for task in self.tasks), *self._over_tasks(found)]
                )
        several, alike = len(self.tasks) > 1, self._alike
        tables = [
            Table(
                ["method", *self.tasks, *["mean of tasks"] * (several and alike)],
                [row if several and alike else row[:-1] for row in rows],
                f"{self.unit.capitalize()}{self._direction()}: mean ± half of the 95 % interval (Student's t), in brackets the standard deviation over the seeds.",
            )
        ]
        if differences:
            note = f"Mean difference to {self.comparison.first} on equal seeds, with the 95 % interval: one that has 0 in it is no difference that these runs show."
            if several:
                note += (
                    " Over the tasks: mean difference, on how many tasks better, and p of Wilcoxon's signed-rank test, two-sided; of "
                    f"{len(self.tasks)} tasks the smallest that it can be is {smallest_probability(len(self.tasks)):.2g}."
                    if alike
                    else " Over the tasks: on how many better; their metrics are different ones."
                )
            tables.append(Table(["method", *self.tasks, *["over the tasks"] * several], differences, note))
        shown = [self._draw("scores.png", pictures.scores, {t: self._scaled(means[t]) for t in self.tasks}, self.unit)]
        with_course = {task: self._courses(task) for task in self.tasks if self._courses(task)}
        if with_course:
            shown.append(self._draw("courses.png", pictures.courses, with_course, self.unit))
        return Section("Scores", "", tables, shown)

    def _paper(self) -> Section | None:
        """The paper's figures, beside what was seen here."""
        reported = self.comparison.paper.get("rows", {})
        if not reported:
            return None
        means = self._by_task("score") if self.scored else {}
        tasks = list(self.comparison.tasks)
        rows = []
        for method, values in reported.items():
            rows.append([f"{method} (paper)", *(str(values.get(task, "")) for task in tasks)])
            if method in self.comparison.methods and self.scored:
                seen = [self._cell(means[task][method]) if method in means.get(task, {}) else "" for task in tasks]
                rows.append([f"{method} (here)", *seen])
        return Section(
            self.comparison.paper.get("title", "Beside the paper"),
            self.comparison.paper.get("text", ""),
            [Table(["method", *tasks], rows)],
        )

    def _times(self) -> Section | None:
        if not self.seconds:
            return None
        first, ratio = self.comparison.first, ratios(self.seconds, self.comparison.first)
        rows = [
            [
                method,
                f"{sorted(found)[len(found) // 2]:.3g}",
                f"{min(found):.3g} - {max(found):.3g}",
                f"{ratio[method]:.2f}",
            ]
            for method, found in self.seconds.items()
        ]
        timing = self.comparison.time
        note = (
            f"Median over {len(self.seconds[first])} round(s) of {timing.steps} steps, in which the methods take turns and have the machine for "
            f"themselves, started with {timing.launch}; the ratio is the median of those within each round."
        )
        shown = []
        if self.scored:
            means = self._by_task("score")
            factors = {**{method: ratio[method] for method in self.seconds}, **self.longer}
            points = {
                task: {m: (mean([factors[m]]), self._scale(found)) for m, found in means[task].items() if m in factors}
                for task in self.tasks
            }
            shown = [self._draw("time.png", pictures.against, points, f"time of a run, of {first}'s", self.unit)]
        return Section(
            "Time", "", [Table(["method", "seconds per step", "range", f"of {first}'s"], rows, note)], shown
        )

    def _sharpness(self) -> Section | None:
        measured = [row for row in self.scored if row["sharpness"] is not None]
        if not measured:
            return None
        sharp, scores = self._by_task("sharpness"), self._by_task("score")
        rows = [
            [m, *(self._plain(sharp[t].get(m)) for t in self.tasks)]
            for m in self.methods
            if any(m in sharp[t] for t in self.tasks)
        ]
        points = {
            task: {m: (sharp[task][m], self._scale(scores[task][m])) for m in sharp[task]}
            for task in self.tasks
            if sharp[task]
        }
        note = "Rise of the loss on held-out batches at the trained weights, by a step of the same length for all methods along their gradient; mean ± half of the 95 % interval."
        picture = self._draw("sharpness.png", pictures.against, points, "sharpness (rise of the loss)", self.unit)
        return Section("Sharpness", "", [Table(["method", *self.tasks], rows, note)], [picture])

    def _landscape(self) -> Section | None:
        """The loss around the weights."""
        if self.landscape is None:
            return None
        asked = self.comparison.landscape
        text = (
            f"Of {asked.task}, seed {asked.seed}: the loss on the evaluation data between the weights of {' and '.join(self.landscape['methods'])}, "
            "and along random directions, normalised by filter, the same ones for all methods."
        )
        return Section(
            "Around the weights", text, [], [self._draw("landscape.png", pictures.landscape, self.landscape)]
        )

    def _chosen(self) -> Section | None:
        """What was chosen, from what."""
        if not self.tried:
            return None
        tasks = list(self.comparison.tasks)
        rows = [
            [method, *(as_text(self.chosen.get((task, method), {})) or "-" for task in tasks)]
            for method in self.comparison.methods
        ]
        choice = self.comparison.choose
        count = choice.trials or len(choice.values[self.comparison.first])
        note = (
            f"Of {count} {'trials' if choice.trials else 'combinations'} for every method, by the mean score over {len(choice.seeds)} seed(s) of runs with "
            f"{as_text(choice.arguments)}, which is to hold a part of the training data out."
        )
        wanted = count * len(choice.seeds) * len(tasks) * len(self.comparison.methods)
        if len(self.tried) < wanted:
            note += f" {wanted - len(self.tried)} of these {wanted} runs have no score, and their combinations were left out."
        if ends := self._at_an_end():
            note += f" At an end of what was tried, beyond which a better value may lie: {'; '.join(ends)}."
        shown = [self._draw("sweeps.png", pictures.sweeps, sweeps, self.unit)] if (sweeps := self._sweeps()) else []
        return Section("Chosen settings", "", [Table(["method", *tasks], rows, note)], shown)

    def _at_an_end(self) -> list[str]:
        """The chosen numbers that are the smallest or the largest of several that were tried."""
        found = []
        for (task, method), values in self.chosen.items():
            for name, value in values.items():
                tried = {each[name] for each in self.comparison.choose.values.get(method, ()) if name in each}
                numbers = len(tried) > 1 and all(_is_number(str(each)) for each in tried)
                if numbers and value and value in (min(tried), max(tried)):
                    found.append(f"{name} {value:g} ({method}, {task})")
        return found

    def _failures(self) -> Section | None:
        if not self.problems:
            return None
        return Section("Runs that failed", "\n\n".join(self.problems))

    # ---- Figures ----

    def _by_task(self, column: str) -> dict[str, dict[str, Mean]]:
        values: dict[str, dict[str, list[float]]] = {task: defaultdict(list) for task in self.tasks}
        for row in self.scored:
            if row[column] is not None:
                values[row["task"]][row["method"]].append(row[column])
        return {task: {method: mean(found) for method, found in of_task.items()} for task, of_task in values.items()}

    def _of(self, task: str, method: str) -> dict[int, float]:
        return {row["seed"]: row["score"] for row in self.scored if (row["task"], row["method"]) == (task, method)}

    def _difference(self, task: str, method: str) -> Mean | None:
        return difference(self._of(task, method), self._of(task, self.comparison.first))

    @property
    def _alike(self) -> bool:
        """Whether scores of all tasks are of one kind, so that there is a mean of them."""
        return len({(self.comparison.metrics[task], self.comparison.is_less_better(task)) for task in self.tasks}) == 1

    def _direction(self) -> str:
        less = {self.comparison.is_less_better(task) for task in self.tasks}
        return f" ({'less' if less == {True} else 'more'} is better)" if len(less) == 1 else ""

    def _over_tasks(self, found: Mapping[str, Mean | None]) -> list[str]:
        if len(self.tasks) < 2:
            return []
        whole = over_tasks([each.value for each in found.values() if each is not None])
        if whole is None:
            return ["-"]
        gains = [
            -each.value if self.comparison.is_less_better(task) else each.value
            for task, each in found.items()
            if each is not None
        ]
        better = f"better on {sum(gain > 0 for gain in gains)} of {whole.tasks}"
        if not self._alike:
            return [better]
        scale = 100 if self.percent else 1
        return [f"{scale * whole.mean:+.{self.digits}f}; {better}; p {whole.probability:.2g}"]

    def _average(self, means: Mapping[str, Mapping[str, Mean]], method: str) -> str:
        """Over the tasks, where the method has all of them."""
        found = [means[task][method].value for task in self.tasks if method in means[task]]
        return self._number(sum(found) / len(found)) if len(found) == len(self.tasks) else "-"

    def _courses(self, task: str) -> dict[str, list[list[list[float]]]]:
        scale, found = 100 if self.percent else 1, defaultdict(list)
        for row in self.scored:
            if row["task"] == task and len(row["course"]) > 1:
                found[row["method"]].append([[step, scale * score] for step, score in row["course"]])
        return dict(found)

    def _sweeps(self) -> dict[tuple[str, str], dict[str, list[tuple[float, list[float]]]]]:
        """Scores by value of each numeric setting that was chosen, over all that was tried with it."""
        found: dict[tuple[str, str], dict[str, dict[float, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        scale = 100 if self.percent else 1
        for row in self.tried:
            words = shlex.split(row["values"])
            for name, value in zip(words[::2], words[1::2], strict=True):
                if _is_number(value):
                    of_method = found[row["task"], name.removeprefix("--")][row["method"]]
                    of_method[float(value)].append(scale * row["score"])
        several = {key: {m: points for m, points in each.items() if len(points) > 1} for key, each in found.items()}
        return {key: {m: list(points.items()) for m, points in each.items()} for key, each in several.items() if each}

    def _draw(self, name: str, draw: Callable[..., None], what: Any, *labels: str) -> Picture:
        file = self.folder / name
        draw(what, self.look, *labels, file)
        return Picture(file, (draw.__doc__ or "").split("\n")[0])

    # ---- Numbers ----

    @property
    def digits(self) -> int:
        return 1 if self.percent else 4

    def _scale(self, each: Mean) -> Mean:
        scale = 100 if self.percent else 1
        return Mean(scale * each.value, scale * each.deviation, scale * each.half, each.count)

    def _scaled(self, found: Mapping[str, Mean]) -> dict[str, Mean]:
        return {method: self._scale(each) for method, each in found.items()}

    def _number(self, value: float) -> str:
        return f"{(100 if self.percent else 1) * value:.{self.digits}f}"

    def _cells(self, means: Mapping[str, Mapping[str, Mean]], method: str) -> list[str]:
        return [self._cell(means[task].get(method)) for task in self.tasks]

    def _cell(self, each: Mean | None) -> str:
        if each is None:
            return "-"
        of_all = len(self.comparison.seeds)
        fewer = [] if each.count == of_all else [f"{each.count} of {of_all} seeds"]
        spread = [] if each.count == 1 else [self._number(each.deviation)]
        interval = "" if each.count == 1 else f" ± {self._number(each.half)}"
        brackets = f" ({'; '.join([*spread, *fewer])})" if spread or fewer else ""
        return f"{self._number(each.value)}{interval}{brackets}"

    def _change(self, each: Mean | None) -> str:
        if each is None:
            return "-"
        scaled = self._scale(each)
        if each.count == 1:
            return f"{scaled.value:+.{self.digits}f}" + f" (1 of {len(self.comparison.seeds)} seeds)" * (
                len(self.comparison.seeds) > 1
            )
        low, high = scaled.interval
        of_all = len(self.comparison.seeds)
        fewer = "" if each.count == of_all else f"; {each.count} of {of_all} seeds"
        return f"{scaled.value:+.{self.digits}f} ({low:+.{self.digits}f} to {high:+.{self.digits}f}{fewer})"

    def _plain(self, each: Mean | None) -> str:
        if each is None:
            return "-"
        return f"{each.value:.3g}" if math.isnan(each.half) else f"{each.value:.3g} ± {each.half:.2g}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
