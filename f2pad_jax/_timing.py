"""Time that JAX spends compiling."""

import functools

import jax


@functools.cache
def _durations() -> list[float]:
    durations: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return durations


def compile_seconds() -> float:
    """Returns the seconds JAX spent tracing, lowering and compiling in this process since the first call."""
    return sum(_durations(), 0.0)
