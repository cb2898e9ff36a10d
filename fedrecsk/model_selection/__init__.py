"""Splitters that know that rows are interactions of users."""

from fedrecsk.model_selection.splits import (
    ColdUserSplit,
    LeaveLastOut,
    PerUserHoldout,
    PerUserKFold,
)

__all__ = ["ColdUserSplit", "LeaveLastOut", "PerUserHoldout", "PerUserKFold"]
