"""Numbers, names and verdicts, as a person reads them."""

import math
from dataclasses import dataclass

from gblm.report import Report


@dataclass(frozen=True)
class Metric:
    """What a metric is called, means, and which way is better: +1 higher, -1 lower, 0 unknown.

    factor: what its values are multiplied by to be in its unit.
    """

    title: str
    means: str
    better: int
    unit: str = ""
    factor: float = 1

    @property
    def direction(self) -> str:
        return {1: "higher is better", -1: "lower is better", 0: ""}[self.better]


PERCENT = "\u00a0%"
METRICS = {
    "perplexity": Metric(
        "perplexity",
        "How many equally likely continuations the model chooses between at each step, on average.",
        -1,
    ),
    "top1": Metric(
        "top-1", "The share of pictures whose most likely class is the correct one.", 1, PERCENT
    ),
    "top5": Metric(
        "top-5",
        "The share of pictures with the correct class among the five most likely.",
        1,
        PERCENT,
    ),
    "cross_entropy": Metric(
        "cross-entropy",
        "The mean negative logarithm of the probability of the correct class, in nats.",
        -1,
    ),
    "exact_match": Metric(
        "exact match", "The share of answers that are right word by word.", 1, PERCENT
    ),
    "accuracy": Metric("accuracy", "The share of labels that are right.", 1, PERCENT),
    "squared_error": Metric("squared error", "The mean squared distance from the label.", -1),
    "acc": Metric("accuracy", "The share of questions answered correctly.", 1, PERCENT, 100),
    "acc_norm": Metric(
        "normalised accuracy",
        "The share of questions answered correctly, with scores divided by the answer's length.",
        1,
        PERCENT,
        100,
    ),
}
TONES = {
    "": "",
    "no significant change": "",
    "as good as before": "good",
    "almost unchanged": "good",
    "slightly worse": "fair",
}
VALUES = ("dense", "pruned", "dense_stderr", "pruned_stderr")  # of an evaluation


def metric(name: str) -> Metric:
    """Return a metric by its name, one without a meaning where the name is unknown."""
    return METRICS.get(name, Metric(name, "", 0))


@dataclass(frozen=True)
class Change:
    """A metric on a data set before and after pruning, in words, with its standard errors."""

    data: str
    metric: Metric
    dense: float
    pruned: float
    dense_error: float = 0.0
    pruned_error: float = 0.0
    on: str = ""  # how many of what it was measured on

    @property
    def before(self) -> str:
        return self._said(self.dense, self.dense_error)

    @property
    def after(self) -> str:
        return self._said(self.pruned, self.pruned_error)

    def _said(self, value: float, error: float) -> str:
        return number(value) + (f" ± {error:.2g}" if error > 0 else "") + self.metric.unit

    @property
    def difference(self) -> str:
        """How much the metric has changed: in points of a percentage, else in percent."""
        difference = self.pruned - self.dense
        if not math.isfinite(difference):
            return "not finite"
        if self.metric.unit:
            return f"{signed(difference, 1)} points"
        if not self.dense:
            return signed(difference, 3)
        return f"{signed(100 * difference / abs(self.dense), 1)}\u00a0%"

    @property
    def verdict(self) -> str:
        """How much worse the metric has become, in words: by points of a percentage, else by ratio.

        What is less than twice the standard error of the difference is no change.
        """
        if not self.metric.better:
            return ""
        if not math.isfinite(self.pruned):
            return "broken"
        if abs(self.pruned - self.dense) < 2 * math.hypot(self.dense_error, self.pruned_error):
            return "no significant change"
        worse = self.metric.better * (self.dense - self.pruned)
        if worse <= 0:
            return "as good as before"
        if self.metric.unit:
            return verdict(worse, (1, 3, 10))
        return verdict(worse / abs(self.dense or 1), (0.02, 0.1, 0.5))

    @property
    def tone(self) -> str:
        """How the verdict is to be shown: good, fair or poor."""
        return TONES.get(self.verdict, "poor")


def verdict(worse: float, steps: tuple[float, float, float]) -> str:
    """Return in words how bad a loss is, by the most that each word but the last stands for."""
    words = ("almost unchanged", "slightly worse", "clearly worse")
    return next(
        (own for own, most in zip(words, steps, strict=True) if worse <= most), "much worse"
    )


def changes(report: Report) -> list[Change]:
    """Return the metrics of a run in words, in the order they were measured."""
    entries = report.evaluation.items()
    short_names = [
        (short(name.removesuffix(f" {entry['metric']}")), entry["metric"])
        for name, entry in entries
    ]
    measured = []
    for key, (name, entry) in zip(short_names, entries, strict=True):
        kind = metric(entry["metric"])
        before, after, *errors = (entry.get(value, 0.0) * kind.factor for value in VALUES)
        data = key[0] if short_names.count(key) == 1 else name
        on = f"{entry['count']:,} {entry['of']}" if "of" in entry else ""
        measured.append(Change(data, kind, before, after, errors[0], errors[1], on))
    return measured


def headline(report: Report) -> str:
    """Return a run in one line: model, sparsity, metric before and after, the verdict."""
    start = f"{short(report.model) or 'A model'} at {percent(report.sparsity)} sparsity"
    change = next(iter(changes(report)), None)
    if change is None:
        return start
    verdict = f", {change.verdict}" if change.verdict else ""
    values = f"{change.before} → {change.after} ({change.difference})"
    return f"{start}: {change.metric.title} {values}{verdict}"


def outcome(report: Report) -> str:
    """Return what became of a run in one line: its metrics before and after, or its sparsity."""
    measured = changes(report)
    several = len({change.data for change in measured}) > 1
    said = [
        f"{f'{change.data} ' if several else ''}{change.metric.title} "
        f"{change.before} → {change.after}"
        for change in measured[:3]
    ]
    return ", ".join(said or [f"{percent(report.sparsity)} of the pruned weights are 0"])


def short(name: str) -> str:
    """Return a name without the folders of its path."""
    return name.rstrip("/").rpartition("/")[2]


def number(value: float) -> str:
    """Return a number with at least three digits; powers of ten where it is very large or small.

    >>> number(48.62), number(1234.5), number(0.0123), number(89.2), number(0)
    ('48.6', '1,234', '0.0123', '89.2', '0')
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(size))) if size else 0
    return f"{value:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, and no sign of what rounds to 0."""
    text = f"{abs(value):,.{digits}f}"
    return text if not float(text.replace(",", "")) else f"{'−' if value < 0 else '+'}{text}"


def percent(share: float) -> str:
    """Return a share as a percentage with one digit."""
    return f"{100 * share:.1f}\u00a0%"


def count(value: int) -> str:
    """Return a count in thousands, millions or billions."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,}"


def counted(value: int, word: str) -> str:
    """Return a count and its word, in the plural unless the count is 1."""
    return f"{value:,} {word}" if value == 1 else f"{value:,} {word}s"


def size(value: float) -> str:
    """Return bytes in the unit that suits them."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(value, 1)) // 3))
    return f"{value / 1000**power:.3g}\u00a0{units[power]}"


def amount(value: float, unit: str) -> str:
    """Return bytes (B) or seconds (s) in the unit that suits them."""
    return size(value) if unit == "B" else time(value)


def gain(ratio: float, least: float = 0.95, most: float = 1.05) -> str:
    """Return what has become of the dense time or bytes; between `least` and `most` is no gain.

    >>> gain(0.62), gain(0.97), gain(1.3), gain(1.3, most=2)
    ('× 0.62', 'no gain', '× 1.30', 'no gain')
    """
    return "no gain" if least < ratio < most else f"× {ratio:.2f}"


def time(seconds: float) -> str:
    """Return a time in milliseconds, seconds, minutes or hours."""
    if seconds < 0.1:
        return f"{1000 * seconds:.3g}\u00a0ms"
    if seconds < 100:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
