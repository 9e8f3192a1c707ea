"""Window arithmetic, on integers only: output sizes, padding, and which elements a tap of the kernel reads.

Along one dimension, output `o` at tap `k` reads element `o * stride + k * dilation - low`; there is one if that lies in
`[0, size)`. Everything else in this module follows from that line.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Padding = str | tuple[tuple[int, int], ...]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Window(NamedTuple):
    """How windows slide along one dimension."""

    size: int
    """The elements that the windows slide over."""
    kernel: int
    """Taps in a window."""
    stride: int
    """From one window to the next."""
    dilation: int
    """From one tap to the next."""
    low: int
    """Padding before the first element."""
    high: int
    """Padding after the last element."""
    out: int
    """How many windows there are."""

    @property
    def extent(self) -> int:
        """Elements from the first tap to the last."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def overreaches(self) -> bool:
        """Whether any tap of any window lies outside the elements."""
        return self.low > 0 or (self.out - 1) * self.stride - self.low + self.extent > self.size

    @property
    def shared_count(self) -> int:
        """How many elements each window holds, or 0 if not every one as many."""
        return 0 if self.overreaches else self.kernel

    @property
    def padded(self) -> "Window":
        """The same windows over the elements and their padding, as if the padding were elements."""
        return self._replace(size=self.low + self.size + self.high, low=0, high=0)

    def elements(self, o: int) -> slice:
        """Return the elements that window `o` reads."""
        begin = o * self.stride - self.low
        first = begin + max(0, -(begin // self.dilation)) * self.dilation
        return slice(first, min(self.size, begin + self.extent), self.dilation)

    def span(self, start: int, stop: int) -> slice:
        """Return where the windows in `[start, stop)` begin and end, padding included: below 0 and beyond the size."""
        return slice(start * self.stride - self.low, (stop - 1) * self.stride - self.low + self.extent)

    def reach(self, start: int, stop: int) -> slice:
        """Return the range of elements that the windows in `[start, stop)` read from."""
        span = self.span(start, stop)
        any_read = span.start < self.size and span.stop > 0
        return slice(max(0, span.start), min(self.size, span.stop)) if any_read else slice(0, 0)

    def tap(self, k: int, start: int, stop: int) -> tuple[slice, slice] | None:
        """Return the elements that tap `k` reads for the outputs in `[start, stop)`, and for which of these outputs.

        Both are slices of equal length, the second relative to `start`; None if the tap only meets padding.
        """
        offset = k * self.dilation - self.low
        first = max(start, -(offset // self.stride))
        last = min(stop, (self.size - 1 - offset) // self.stride + 1)
        if first >= last:
            return None
        step = min(self.stride, self.size)  # a longer one reads one element, wherever it would go next
        reads = slice(first * self.stride + offset, (last - 1) * self.stride + offset + 1, step)
        return reads, slice(first - start, last - start)

    def taps(self, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
        """Yield `(k, reads, writes)` for every tap that meets an element: see `tap`."""
        first = -(((stop - 1) * self.stride - self.low) // self.dilation)
        last = (self.size - 1 + self.low - start * self.stride) // self.dilation
        for k in range(max(0, first), min(self.kernel, last + 1)):
            found = self.tap(k, start, stop)
            if found is not None:
                yield k, *found

    def phases(self) -> Iterator[tuple[slice, slice, "Window"]]:
        """Yield what adds outputs back to elements, as convolutions of the outputs: `(elements, taps, windows)`.

        Elements a stride apart are reached by the same taps, each from the output before: tap `k` from output
        `(i + low - k * dilation) / stride`. In reverse order (the caller flips them), these taps slide over the outputs
        like any window. Elements that no tap reaches are left out.
        """
        common = math.gcd(self.stride, self.dilation)
        step, spacing = self.stride // common, self.dilation // common
        for k in range(min(step, self.kernel)):
            phase = (k * self.dilation - self.low) % self.stride
            if phase < self.size:
                count = len(range(k, self.kernel, step))
                low = (count - 1) * spacing - (phase + self.low - k * self.dilation) // self.stride
                out = len(range(phase, self.size, self.stride))
                yield (
                    slice(phase, None, self.stride),
                    slice(k, None, step),
                    Window(self.out, count, 1, spacing, low, 0, out),
                )

    def first_empty(self) -> int | None:
        """Return the first window that holds no element, or None. Only those that begin in padding can be empty."""
        if self.low > (self.kernel - 1) * self.dilation:  # the first window ends before the first element
            return 0
        if self.dilation > self.size:  # two taps may leap over all elements
            period = self.dilation // math.gcd(self.stride, self.dilation)
            for o in range(min(self.out, -(-self.low // self.stride), period)):
                if (o * self.stride - self.low) % self.dilation >= self.size:
                    return o
        beyond = -(-(self.size + self.low) // self.stride)
        return beyond if beyond < self.out else None


class AdaptiveWindow(NamedTuple):
    """Windows that share out a dimension: window `o` is `[floor(o * size / out), ceil((o + 1) * size / out))`.

    Windows `o` and `o + out / gcd` lie `size / gcd` elements apart, with `gcd` that of `size` and `out`. So the windows
    fall into `out / gcd` families, each as regular as those of a `Window`.
    """

    size: int
    """The elements that the windows share out."""
    out: int
    """How many windows there are."""

    def elements(self, o: int) -> slice:
        """Return the elements that window `o` reads."""
        return slice(o * self.size // self.out, -(-(o + 1) * self.size // self.out))

    def reach(self, start: int, stop: int) -> slice:
        """Return the range of elements that the windows in `[start, stop)` read from."""
        return slice(self.elements(start).start, self.elements(stop - 1).stop)

    @property
    def shared_count(self) -> int:
        """How many elements each window holds, or 0 if not every one as many."""
        return 0 if self.size % self.out else self.size // self.out

    @property
    def padded(self) -> "AdaptiveWindow":
        """The same windows: there is no padding."""
        return self

    def taps(self, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
        """Yield `(k, reads, writes)` for every tap of every family, in the order of the taps: see `Window.tap`."""
        families = self.out // math.gcd(self.size, self.out)
        stride = self.size * families // self.out
        windows = [(o, self.elements(o)) for o in range(start, min(stop, start + families))]
        for k in range(max(window.stop - window.start for _, window in windows)):
            for o, window in windows:
                first = window.start + k
                if first < window.stop:
                    count = len(range(o, stop, families))
                    yield (
                        k,
                        slice(first, first + (count - 1) * stride + 1, stride),
                        slice(o - start, stop - start, families),
                    )


Windows = tuple[Window, ...]
AnyWindows = Sequence[Window | AdaptiveWindow]


def whole(windows: AnyWindows, outputs: Sequence[slice]) -> bool:
    """Return whether the outputs are all that there are, so that what they read is read by no other tile."""
    return all(o.stop - o.start == window.out for window, o in zip(windows, outputs, strict=True))


def spans(windows: Windows, outputs: Sequence[slice]) -> tuple[slice, ...]:
    """Return where the outputs begin and end along each dimension, padding included."""
    return tuple(window.span(o.start, o.stop) for window, o in zip(windows, outputs, strict=True))


def reach(windows: AnyWindows, outputs: Sequence[slice]) -> tuple[slice, ...]:
    """Return the range of elements along each dimension that the outputs read from."""
    return tuple(window.reach(o.start, o.stop) for window, o in zip(windows, outputs, strict=True))


def within(elements: slice, region: slice) -> slice:
    """Return the same elements, counted from the beginning of the region that holds them."""
    return slice(elements.start - region.start, elements.stop - region.start, elements.step)


Tap = tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]


def taps(windows: AnyWindows, outputs: Sequence[slice]) -> Iterator[Tap]:
    """Yield every tap of the kernel that meets an element: `(where in the kernel, reads, writes)`.

    For each output, its taps come in row-major order.
    """
    along = [list(window.taps(o.start, o.stop)) for window, o in zip(windows, outputs, strict=True)]
    for found in itertools.product(*along):
        k, reads, writes = zip(*found, strict=True)
        yield k, reads, writes


def conv_window(size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int] | str) -> Window:
    """Return the windows of a convolution or of pooling without `ceil_mode`; `out` may come out below 1."""
    extent = dilation * (kernel - 1) + 1
    if padding in ("same", "same_lower"):
        out = -(-size // stride)
        low, high = _share(max(0, (out - 1) * stride + extent - size), padding)
    else:
        low, high = _pair(padding)
        out = (size + low + high - extent) // stride + 1
    return Window(size, kernel, stride, dilation, low, high, out)


def pool_window(
    size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int] | str, ceil_mode: bool
) -> Window:
    """Return the windows of pooling; with `ceil_mode` the last may hang over the end, but not begin beyond it."""
    window = conv_window(size, kernel, stride, dilation, padding)
    if not ceil_mode or padding in ("same", "same_lower"):
        return window
    out = -(-(size + window.low + window.high - window.extent) // stride) + 1
    if (out - 1) * stride >= size + window.low:
        out -= 1
    return window._replace(out=out)


def transposed_window(
    size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int] | str, output_padding: int
) -> Window:
    """Return the windows of the convolution whose adjoint has `size` inputs: `window.size` is what it puts out."""
    full = (size - 1) * stride + dilation * (kernel - 1) + 1
    if padding in ("same", "same_lower"):
        low, high = _share(max(0, full + output_padding - size * stride), padding)  # the total as ONNX counts it
        result = size * stride
    else:
        low, high = _pair(padding)
        result = full - low - high + output_padding
    return Window(result, kernel, stride, dilation, low, high, size)


def _share(total: int, padding: tuple[int, int] | str) -> tuple[int, int]:
    """Share out the total of "same": the odd one goes to the high side, with "same_lower" to the low side."""
    half = total // 2
    return (total - half, half) if padding == "same_lower" else (half, total - half)


def _pair(padding: tuple[int, int] | str) -> tuple[int, int]:
    return (0, 0) if isinstance(padding, str) else padding  # the string that is left is "valid"
