"""The one exception of evaluation."""

__all__ = ['EvaluationError']


class EvaluationError(RuntimeError):
    """What was asked for cannot be measured; the message says what was got, what was expected and what to do."""
