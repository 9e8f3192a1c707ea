"""What a comparison found: for a person as text and picture, for a program as fields."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Report", "ResultReport"]


@dataclass(frozen=True)
class ResultReport:
    """The comparison of one result."""

    name: str
    """Of the result, such as "dkey"; "the result" if it is the only one."""
    shape: tuple[int, ...]
    dtype: str
    wrong: int
    """How many elements are further off than rounding explains; all if the shape is wrong."""
    problem: str | None = None
    """What is wrong apart from numbers: a shape."""
    worst: tuple[int, ...] | None = None
    """The index of the element that is furthest off, in units of its bound."""
    got: Any = None
    due: Any = None
    difference: float = 0.0
    bound: float = 0.0
    """How much of the difference rounding explains there."""
    error: float = 0.0
    """The largest error in units of the bound, of elements that are right, too."""
    patterns: tuple[str, ...] = ()
    """Where the wrong elements are, and what would explain them."""
    errors: Any = field(default=None, repr=False, compare=False)
    """The error of each element in units of its bound."""

    @property
    def ok(self) -> bool:
        """Whether rounding explains every element."""
        return self.wrong == 0 and self.problem is None

    def __str__(self) -> str:
        """Return a line, and one more for each pattern."""
        if self.problem is not None:
            return f"{self.name} {self.problem}"
        if self.ok:
            return f"{self.name} is right: the largest error is {self.error:.2g} of its bound"
        size = int(np.prod(self.shape))
        lines = [
            f"{self.name} is wrong in {self.wrong} of {size} elements; worst at {list(self.worst or ())}: "
            f"{self.got!r}, reference {self.due!r}; they differ by {self.difference:.3e}, and rounding in {self.dtype} "
            f"explains {self.bound:.3e}"
        ]
        return "\n    ".join([*lines, *self.patterns])


@dataclass(frozen=True)
class Report:
    """The comparison of all results of a call."""

    call: str
    """The function, its options, and the shapes of its arrays."""
    results: tuple[ResultReport, ...]

    @property
    def ok(self) -> bool:
        """Whether rounding explains every element of every result."""
        return all(result.ok for result in self.results)

    def __bool__(self) -> bool:
        """Return `ok`."""
        return self.ok

    def __getitem__(self, name: str) -> ResultReport:
        """Return the report of one result."""
        return next(result for result in self.results if result.name == name)

    def __str__(self) -> str:
        """Return the call, and a paragraph for each result, wrong ones first."""
        results = sorted(self.results, key=lambda result: result.ok)
        return "\n".join([*map(str, results), f"in {self.call}"])

    def plot(self, name: str | None = None, plane: tuple[int, ...] | None = None) -> Any:
        """Draw the errors of one plane of a result, in units of their bounds.

        Parameters
        ----------
        name : str, optional
            Of the result; the worst one unless given.
        plane : tuple of ints, optional
            The index of all dimensions but the last two; that of the worst element unless given.

        Returns
        -------
        matplotlib.figure.Figure
            Errors above 1, which rounding does not explain, in red.
        """
        from matplotlib import colors
        from matplotlib.figure import Figure

        compared = [result for result in self.results if result.errors is not None]
        result = max(compared, key=lambda result: result.error) if name is None else self[name]
        errors = np.atleast_2d(result.errors)
        worst = result.worst if result.worst is not None else np.unravel_index(np.argmax(errors), errors.shape)
        at = tuple(int(i) for i in (plane if plane is not None else worst[: errors.ndim - 2]))
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes = figure.subplots()
        norm = colors.LogNorm(vmin=1e-3, vmax=1e3, clip=True)
        image = axes.imshow(np.maximum(errors[at], 1e-3), norm=norm, cmap="RdBu_r", aspect="auto", interpolation="none")
        figure.colorbar(image, label="error in units of its bound (above 1: wrong)")
        axes.set(title=f"{result.name}{list(at) if at else ''}", xlabel="last dimension", ylabel="last but one")
        return figure
