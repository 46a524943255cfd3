"""Time spent compiling, so that it can be told apart from running."""

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
    """Seconds JAX has spent tracing, lowering and compiling in this process since this was first called."""
    return sum(_durations(), 0.0)
