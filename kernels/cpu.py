"""The compiled CPU twins; importing this registers them."""

from whalepod.kernels import (
    attend_cpu,
    choose_cpu,
    draw_cpu,
    experts_cpu,
    hyper_connection_cpu,
    linear_cpu,
    pool_cpu,
    rotary_cpu,
    routes_cpu,
)

__all__ = [
    "attend_cpu",
    "choose_cpu",
    "draw_cpu",
    "experts_cpu",
    "hyper_connection_cpu",
    "linear_cpu",
    "pool_cpu",
    "rotary_cpu",
    "routes_cpu",
]
