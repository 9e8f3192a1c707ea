"""What the author of a kernel needs to check it: numeric gradients."""

from .gradients import check_gradients

__all__ = ["check_gradients"]
