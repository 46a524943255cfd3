"""The backend that programs are compiled for, asked in one way."""

import jax
import jax.numpy as jnp


def on_cpu() -> bool:
    """Returns whether the default device is a CPU, inside a trace or outside."""
    with jax.ensure_compile_time_eval():
        (device,) = jnp.zeros(()).devices()
    return device.platform == "cpu"
