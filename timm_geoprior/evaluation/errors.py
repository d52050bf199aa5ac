"""The exceptions of evaluation."""

__all__ = ['EvaluationError', 'ProcessError']


class EvaluationError(RuntimeError):
    """What was asked for cannot be measured; the message says what was got, what was expected and what to do."""


class ProcessError(EvaluationError):
    """One that a single process may meet alone, so that each process has to tell it."""
